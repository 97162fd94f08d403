"""agent.toml: every mistake is one line that names the key and the file."""

import pytest

from agent import settings
from agent.errors import SettingsError


def load(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return settings.load(path)


def test_an_empty_file_is_all_defaults(tmp_path):
    loaded = load(tmp_path, "")
    assert loaded.cloud.port == 8883
    assert str(loaded.certificate_file) == "/var/lib/camera-agent/identity/certificate.pem"
    assert str(loaded.api_socket) == "/run/camera-agent/api.sock"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cloud]\nendpont = 'x'", "cloud.endpont: unknown key, did you mean endpoint?"),
        ("[clod]\n", "clod: unknown key, did you mean cloud?"),
        ("[cloud]\nport = 'many'", "cloud.port: Input should be a valid integer"),
        ("[cloud]\nport = 70000", "cloud.port: Input should be less than or equal to 65535 (got 70000)"),
        ("[cloud]\nproxy_url = 'socks5://x'", "cloud.proxy_url"),
        ("[capture.sources.front]\npattern = '*.jpg'", "capture.sources.front.directory: missing"),
        ("[capture.sources.'Front Door']\ndirectory = '/x'", "capture.sources.Front Door"),
        ("[updates.targets.p]\ninstaller = 'app'", "installer app needs root"),
        ("[updates.targets.p]\ninstaller = 'zip'", "updates.targets.p.installer"),
        ("[updates.targets.p]\ninstaller='deb'\nunit='a.service'\nrestart=['b']", "set unit or restart, not both"),
        ("[config.targets.p]\npath = '/x'\napply = 'reload'", "apply = 'reload' needs unit"),
        ("[jobs]\nallow = ['format']", "jobs.allow.0"),
        ("[telemetry]\ntopic_prefix = 'a/#'", "telemetry.topic_prefix"),
        ("thing_name = 'a b'", "thing_name"),
        ("a = [", "not valid TOML"),
    ],
)
def test_a_mistake_names_the_key_and_the_file(tmp_path, text, said):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert str(tmp_path / "agent.toml") in caught.value.message
    assert "\n" not in caught.value.message.replace(text, "")


def test_every_mistake_is_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "[cloud]\nport = 0\nendpont = ''\n[log]\nlevel = 'loud'")
    for key in ("cloud.port", "cloud.endpont", "log.level"):
        assert key in caught.value.message


def test_a_missing_or_unreadable_file(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        settings.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary\.toml"):
        settings.load(tmp_path / "binary.toml")
    with pytest.raises(SettingsError):
        settings.load(tmp_path)


def test_only_marked_keys_may_be_set_by_the_cloud():
    assert settings.remote(("telemetry", "interval_s")).applies == "live"
    assert settings.remote(("capture", "sources", "any", "interval_s"))
    for local in (
        ("cloud", "endpoint"),
        ("jobs", "allow"),
        ("updates", "keys_dir"),
        ("thing_name",),
        ("nothing", "here"),
    ):
        assert settings.remote(local) is None


def test_every_key_says_what_it_means():
    undocumented = []

    def walk(model, path):
        for name, field in model.model_fields.items():
            inner = settings.section_at((*path, name)) or settings.section_at((*path, name, "x"))
            if inner:
                walk(inner, (*path, name) if settings.section_at((*path, name)) else (*path, name, "x"))
            elif not field.description:
                undocumented.append(".".join((*path, name)))

    walk(settings.Settings, ())
    assert undocumented == []
