"""agent.toml: every mistake is one line that names the key and the file."""

import pytest

from agent import setting_keys, settings_file
from agent.errors import SettingsError
from agent.settings import Settings
from agent.settings_file import validate


def load(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return settings_file.load(path)


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
        ("[updates.targets.p]\ninstaller='rauc'\nunit='a.service'\nrestart=['b']", "set unit or restart, not both"),
        ("[updates.targets.p]\ninstaller = 'deb'", "installer deb needs package"),
        ("[updates.targets.p]\ninstaller = 'agent'", "installer agent needs root"),
        ("[updates.targets.p]\ninstaller = 'deb'\npackage = 'A b'", "updates.targets.p.package"),
        (
            "[updates.targets]\na = {installer = 'deb', package = 'xx'}\nb = {installer = 'deb', package = 'xx'}",
            "targets a and b have the same package",
        ),
        (
            "[updates.targets]\na = {installer = 'rauc'}\nb = {installer = 'rauc'}",
            "targets a and b have the same system",
        ),
        ("[maintenance]\nwindows = ['22-04']", "maintenance.windows.0: write it as 22:00-04:00"),
        ("[maintenance]\nwindows = ['mon-fry 22:00-04:00']", "is none of mon, tue"),
        ("[maintenance]\ntime_zone = 'Madrid'", "maintenance.time_zone: give a name of the time zone database"),
        ("[[updates.rate_limits]]\nhours = '25:00-26:00'\nbytes_per_s = 5000", "25:00 is no time of day"),
        ("[config.targets.p]\npath = '/x'\napply = 'reload'", "apply = 'reload' needs unit"),
        ("[jobs]\nallow = ['format']", "jobs.allow.0"),
        ("[telemetry]\ntopic_prefix = 'a/#'", "telemetry.topic_prefix"),
        ("thing_name = 'a b'", "thing_name"),
        ("a = [", "not valid TOML"),
        ("a = " + "1" * 5000, "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        ("'a\\nb' = 1".replace("'", '"'), "a\\nb: unknown key"),
        (
            "[paths]\nstate_dir = 'state'",
            "paths.state_dir: give an absolute path, one that begins with / (got 'state')",
        ),
        ("[paths]\nstate_dir = ''", "paths.state_dir: give an absolute path"),
        ("[paths]\nruntime_dir = './run'", "paths.runtime_dir: give an absolute path"),
        ("[paths]\nruntime_dir = '~/run'", "paths.runtime_dir: give an absolute path"),
        ('[paths]\nstate_dir = "/a\\u0000b"', "paths.state_dir: has a NUL character"),
        ("[cloud]\nca_file = 'ca.pem'", "cloud.ca_file: give an absolute path"),
        ("[cloud]\ncertificate_file = 'c.pem'", "cloud.certificate_file: give an absolute path"),
        ("[provisioning]\nclaim_private_key_file = 'c'", "provisioning.claim_private_key_file: give an absolute"),
        ("[jobs]\nhandler_dir = 'handlers'", "jobs.handler_dir: give an absolute path"),
        ("[updates]\nkeys_dir = 'keys'", "updates.keys_dir: give an absolute path"),
        ("[updates.targets.p]\ninstaller = 'app'\nroot = 'p'", "updates.targets.p.root: give an absolute path"),
        ("[config.targets.p]\npath = 'p.json'", "config.targets.p.path: give an absolute path"),
        ("[config.targets.p]\npath = '/p'\nschema_file = 's'", "config.targets.p.schema_file: give an absolute"),
        ("[capture.sources.front]\ndirectory = 'images'", "capture.sources.front.directory: give an absolute path"),
        (
            "[capture.sources]\nfront = {directory = '/x'}\nback = {directory = '/x/../x/'}",
            "capture: sources front and back have the same directory and pattern",
        ),
        (
            "[updates.targets]\na = {installer = 'app', root = '/x'}\nb = {installer = 'app', root = '/x/'}",
            "updates: targets a and b have the same root",
        ),
        ("[config.targets]\na = {path = '/x'}\nb = {path = '/./x'}", "config: targets a and b have the same path"),
        ("[cloud]\nendpoint = 'https://h.example'", "cloud.endpoint: give the host name only"),
        ("[cloud]\nendpoint = 'h.example/mqtt'", "cloud.endpoint: give the host name only"),
        ("[cloud]\nendpoint = 'h.example:8883'", "cloud.endpoint: give the host name only"),
        ("[cloud]\nendpoint = ' h.example'", "cloud.endpoint: give the host name only"),
        (f"[paths]\nruntime_dir = '/{'r' * 98}'", "too long: the path of api.sock in it has 108 bytes, at most 107"),
        (f"[paths]\nruntime_dir = '/{'ü' * 50}'", "too long: the path of api.sock in it has 110 bytes"),
        ("[capture.sources.a]\ndirectory = '/x'\ninterval_s = 1e-300", "greater than or equal to 0.01"),
        ("[capture.sources.a]\ndirectory = '/x'\ninterval_s = nan", "capture.sources.a.interval_s"),
        ("[capture]\nslow_ratio = 1e-300", "capture.slow_ratio"),
        ("[capture]\nblur_drop = 1e-300", "capture.blur_drop"),
        ("[telemetry]\nbacklog_per_s = 1e-300", "telemetry.backlog_per_s"),
        ("[telemetry]\noutbox_max_bytes = 9223372036854775808", "telemetry.outbox_max_bytes"),
        ("[telemetry]\noutbox_max_age_s = 9223372036854775807", "telemetry.outbox_max_age_s"),
        ("[updates.targets.p]\ninstaller = 'deb'\nprobe = ['']", "updates.targets.p.probe: give the program"),
        ('[config.targets.p]\npath = "/x"\napply = ["a\\u0000"]', "config.targets.p.apply"),
        ("[updates.targets.p]\ninstaller = 'deb'\nunit = 'a b'", "updates.targets.p.unit"),
    ],
)
def test_a_mistake_names_the_key_and_the_file(tmp_path, text, said):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert str(tmp_path / "agent.toml") in caught.value.message
    assert "\n" not in caught.value.message.replace(text, "")


def test_what_is_near_a_mistake_and_is_none(tmp_path):
    loaded = load(
        tmp_path,
        f"""
        [cloud]
        endpoint = "::1"
        [paths]
        runtime_dir = "/{"r" * 97}"
        [updates.targets]
        a = {{installer = "deb", package = "g++"}}
        b = {{installer = "deb", package = "b2", unit = "b@1.service"}}
        [capture.sources]
        front = {{directory = "/x", pattern = "front-*.jpg", interval_s = 0.01}}
        back = {{directory = "/x", pattern = "back-*.jpg"}}
        """,
    )
    assert len(str(loaded.api_socket)) == 107
    assert list(loaded.capture.sources) == ["front", "back"]


def test_every_mistake_is_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "[cloud]\nport = 0\nendpont = ''\n[log]\nlevel = 'loud'")
    for key in ("cloud.port", "cloud.endpont", "log.level"):
        assert key in caught.value.message


def test_a_missing_or_unreadable_file(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        settings_file.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary\.toml"):
        settings_file.load(tmp_path / "binary.toml")
    with pytest.raises(SettingsError):
        settings_file.load(tmp_path)


def test_only_marked_keys_may_be_set_by_the_cloud():
    assert setting_keys.remote(("telemetry", "interval_s")).applies == "live"
    assert setting_keys.remote(("capture", "sources", "any", "interval_s"))
    for local in (
        ("cloud", "endpoint"),
        ("jobs", "allow"),
        ("updates", "keys_dir"),
        ("thing_name",),
        ("nothing", "here"),
    ):
        assert setting_keys.remote(local) is None


def test_every_key_says_what_it_means():
    undocumented = []

    def walk(model, path):
        for name, field in model.model_fields.items():
            inner = setting_keys.section_at((*path, name)) or setting_keys.section_at((*path, name, "x"))
            if inner:
                walk(inner, (*path, name) if setting_keys.section_at((*path, name)) else (*path, name, "x"))
            elif not field.description:
                undocumented.append(".".join((*path, name)))

    walk(Settings, ())
    assert undocumented == []


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://user:p[w@h",
            "http://user:p#w@h",
            "http://user:p?w@h",
            "http://a..b:3128",
            "http://#x",
            "http://[::1",
        ),
        *("http://" + "x" * 64 + ".org:1", "https://h", "http://h/path", "h:3128", "http://h:99999"),
    ],
)
def test_a_proxy_that_can_not_be_asked_is_refused_with_how_to_write_it(url):
    with pytest.raises(SettingsError, match=r"cloud.proxy_url: give http://\[user:password@\]host"):
        validate({"cloud": {"proxy_url": url}}, "agent.toml")


@pytest.mark.parametrize("url", ["", "http://p:3128", "http://u:p%40w@proxy.example.com:3128/", "http://[::1]:3128"])
def test_a_good_proxy(url):
    assert validate({"cloud": {"proxy_url": url}}, "agent.toml").cloud.proxy_url == url
