"""Session data encrypted at rest: each top-level value is a frame in base64, so that the server can merge
keys without reading values. Names of values, user ids and metadata stay readable.

Data is never compressed: a client who chooses a part of it could tell from the size what is next to that.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import msgspec

from ..._observe import warning
from ..._ops.op import Op, Result, Signal
from ...config import VALUE_SIZE_MAX
from ...errors import DecodingError
from ...transforms import MAGIC, AesGcmSiv, Transforms
from .data import document, read_document
from .sql import Loaded, Mode, Outcome, SessionStatements

FRAME = b64encode(MAGIC).decode()  # no JSON text begins like this


class EncryptedSessionStatements(SessionStatements):
    def __init__(self, config: Any, table: Any, lifetimes: Any, *, inside: bool) -> None:
        super().__init__(config, table, lifetimes, inside=inside)
        self._cipher: AesGcmSiv = config.transforms[-1]
        self._transforms = Transforms([self._cipher], table.name, VALUE_SIZE_MAX)

    def create(self, id: bytes, user_id: str | None, data: bytes, *more: Any) -> Op[Any]:
        return super().create(id, user_id, self._sealed(data), *more)

    def save(self, id: bytes, mode: Mode, version: int, changed: bytes, *more: Any) -> Op[Outcome]:
        return super().save(id, mode, version, self._sealed(changed), *more)

    def rotate(
        self, id: bytes, new_id: bytes, changed: bytes, removed: list[bytes], **more: Any
    ) -> Op[Outcome]:
        return super().rotate(id, new_id, self._sealed(changed), removed, **more)

    def _sealed(self, data: bytes) -> bytes:
        seal = self._transforms.seal
        texts = read_document(data)
        return document(
            {
                name: b64encode(seal(name.encode(), text.encode())).decode()
                for name, text in texts.items()
            }
        )

    def _read_loaded(self, result: Result) -> Loaded | Signal | None:
        loaded = super()._read_loaded(result)
        if not isinstance(loaded, Loaded):
            return loaded
        try:
            texts = {
                name: self._opened(name, text) for name, text in read_document(loaded.data).items()
            }
        except (ValueError, msgspec.MsgspecError) as error:
            # The session belongs to no one then: its visitor logs in again.
            warning("pgkv.session.unreadable", key_id=getattr(error, "key_id", 0))
            return None
        return loaded._replace(data=document(texts))

    def _opened(self, name: str, text: str) -> str:
        if text.startswith(FRAME):
            return self._transforms.open(name.encode(), b64decode(text)).decode()
        if not self._cipher.read_plain:
            raise DecodingError("not encrypted")
        return text
