"""Ed25519 keys that stay in a PKCS#11 token, named by an RFC 7512 URI. Needs the library python-pkcs11.

What a token signs is checked against its public key before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, unquote_to_bytes

from .errors import NotAtHandError, SigningError
from .passphrases import Secrets

SCHEME = "pkcs11:"
TOKEN_ATTRIBUTES = ("token", "serial", "manufacturer", "model", "slot-id")
PATH_ATTRIBUTES = (*TOKEN_ATTRIBUTES, "object", "id", "type")
QUERY_ATTRIBUTES = ("module-path", "pin-source")
PUBLIC_BYTES = 32
OCTET_STRING_OF_32 = b"\x04\x20"


@dataclass(frozen=True)
class TokenKey:
    """A parsed URI: which token, which key in it, which library reaches it."""

    uri: str
    attributes: dict[str, str]
    key_id: bytes
    module: str
    pin_source: Path | None

    @property
    def name(self) -> str:
        return self.attributes.get("object") or f"id-{self.key_id.hex()}"

    @property
    def token(self) -> str:
        """The token in a word, for people."""
        found = [self.attributes[key] for key in TOKEN_ATTRIBUTES if key in self.attributes]
        return found[0] if found else "(any)"


def parse_uri(uri: str, module: str = "") -> TokenKey:
    """Raises SigningError. `module` is the library when the URI has no `module-path`."""
    path, _, query = uri.removeprefix(SCHEME).partition("?")
    attributes = _attributes(path, ";", PATH_ATTRIBUTES, uri)
    settings = _attributes(query, "&", QUERY_ATTRIBUTES, uri)
    raw_id = next((part[3:] for part in path.split(";") if part.startswith("id=")), "")
    if "object" not in attributes and not raw_id:
        raise SigningError(f"{uri} names no key: add object=LABEL or id=%01")
    if attributes.get("type", "private") not in ("private", "public"):
        raise SigningError(f"{uri} is of type {attributes['type']}, a key is needed")
    source = settings.get("pin-source", "").removeprefix("file:")
    return TokenKey(
        uri,
        attributes,
        unquote_to_bytes(raw_id),
        settings.get("module-path", "") or module,
        Path(source) if source else None,
    )


def with_module(uri: str, module: str) -> str:
    """The URI with its library in it, so that it can be kept."""
    if not module or "module-path=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}module-path={quote(module)}"


def public_key(key: TokenKey, secrets: Secrets) -> bytes:
    """The 32 bytes of the public key in the token. Raises SigningError, NotAtHandError."""
    with _token(key) as token:
        with token.open() as session:
            found = _objects(session, key, "PUBLIC_KEY")
        if not found:
            with _logged_in(token, key, secrets) as session:
                found = _objects(session, key, "PUBLIC_KEY")
    return _only(found, key, "public key")[1]


def signing(key: TokenKey, secrets: Secrets) -> Callable[[bytes], bytes]:
    """A function that lets the token sign. Raises SigningError, NotAtHandError when called."""

    def sign(data: bytes) -> bytes:
        from pkcs11 import Mechanism

        with _token(key) as token, _logged_in(token, key, secrets) as session:
            private, _ = _only(_objects(session, key, "PRIVATE_KEY"), key, "private key")
            return bytes(private.sign(data, mechanism=Mechanism.EDDSA))

    return sign


def _attributes(text: str, separator: str, known: tuple[str, ...], uri: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if name in ("pin-value", "pin"):
            raise SigningError("a PIN does not belong into a pkcs11: URI, which is kept; give --pin-file")
        if name not in known or not equals or name in found:
            raise SigningError(f"{uri}: {part!r} is not understood; known are {', '.join(known)}")
        found[name] = unquote(value)
    return found


@contextmanager
def _token(key: TokenKey) -> Iterator[Any]:
    """The one token that fits, with the library's errors in words."""
    try:
        import pkcs11
    except ImportError:
        raise SigningError("keys in tokens need the library python-pkcs11: pip install python-pkcs11") from None
    if not key.module:
        raise SigningError(f"{key.uri}: which PKCS#11 library? Give --module FILE or add ?module-path=FILE")
    if not Path(key.module).exists():
        raise SigningError(f"the PKCS#11 library {key.module} is not there")
    try:
        tokens = [token for token in pkcs11.lib(key.module).get_tokens() if token.label]
        fitting = [token for token in tokens if _fits(token, key)]
        if len(fitting) != 1:
            _no_token(key, [token.label for token in tokens], len(fitting))
        yield fitting[0]
    except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
        raise SigningError(f"the PIN of token {key.token} is wrong; too many wrong ones lock it") from None
    except pkcs11.PinLocked:
        raise SigningError(f"token {key.token} is locked after too many wrong PINs") from None
    except pkcs11.PKCS11Error as error:
        raise SigningError(f"token {key.token}: {type(error).__name__} {error}".rstrip()) from None


def _no_token(key: TokenKey, labels: list[str], fitting: int) -> NoReturn:
    if fitting:
        raise SigningError(f"{fitting} tokens fit {key.uri}; add serial= to say which")
    there = ", ".join(sorted(labels)) or "none"
    raise NotAtHandError(f"token {key.token} is not there ({key.module} has: {there})")


def _fits(token: Any, key: TokenKey) -> bool:
    serial = token.serial.decode(errors="replace") if isinstance(token.serial, bytes) else token.serial
    values = {
        "token": token.label,
        "serial": serial.strip(),
        "manufacturer": token.manufacturer_id,
        "model": token.model,
        "slot-id": str(token.slot.slot_id),
    }
    return all(values[name] == wanted for name, wanted in key.attributes.items() if name in values)


@contextmanager
def _logged_in(token: Any, key: TokenKey, secrets: Secrets) -> Iterator[Any]:
    import pkcs11

    pad = pkcs11.TokenFlag.PROTECTED_AUTHENTICATION_PATH in token.flags
    pin = pkcs11.PROTECTED_AUTH if pad else secrets.pin(token.label, key.pin_source)
    with token.open(user_pin=pin) as session:
        yield session


def _objects(session: Any, key: TokenKey, kind: str) -> list[tuple[Any, bytes]]:
    """The Ed25519 keys of one kind that fit, each with its public half when it is a public key."""
    from pkcs11 import Attribute, KeyType, ObjectClass

    wanted: dict[Any, Any] = {Attribute.CLASS: ObjectClass[kind], Attribute.KEY_TYPE: KeyType.EC_EDWARDS}
    if "object" in key.attributes:
        wanted[Attribute.LABEL] = key.attributes["object"]
    if key.key_id:
        wanted[Attribute.ID] = key.key_id
    found = list(session.get_objects(wanted))
    return [(item, _point(item[Attribute.EC_POINT], key) if kind == "PUBLIC_KEY" else b"") for item in found]


def _point(point: bytes, key: TokenKey) -> bytes:
    public = point.removeprefix(OCTET_STRING_OF_32) if len(point) == PUBLIC_BYTES + 2 else point
    if len(public) != PUBLIC_BYTES:
        raise SigningError(f"{key.uri} is an Edwards key of another curve, Ed25519 is needed")
    return bytes(public)


def _only(found: list[tuple[Any, bytes]], key: TokenKey, what: str) -> tuple[Any, bytes]:
    if not found:
        raise SigningError(f"token {key.token} has no Ed25519 {what} {key.name}; look with pkcs11-tool --list-objects")
    if len(found) > 1:
        raise SigningError(f"token {key.token} has {len(found)} keys {key.name}; add id= to say which")
    return found[0]
