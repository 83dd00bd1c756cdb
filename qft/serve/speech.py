"""A sound file that a client sends, and what is said in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import Request

from qft.bundle.generate import Answer
from qft.bundle.manifest import Bundle
from qft.bundle.seq2seq import Seq2SeqRunner
from qft.errors import InputError
from qft.serve.errors import ApiError

# Fields beside the file, with the values that are served; model is looked at elsewhere.
_SERVED = {"language": ("en",), "response_format": ("json", "text"), "temperature": ("0", "0.0"), "stream": ("false",)}


@dataclass(frozen=True)
class Sound:
    """A file's bytes, its name, the model asked for, and whether the answer is to be plain text."""

    content: bytes
    name: str
    model: str | None
    plain: bool


async def sound_of(request: Request) -> Sound:
    """The form that a client sent. Raises ApiError if it holds no file, or asks for what is not served."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the sound as multipart/form-data, field file", param="file")
    async with request.form(max_files=1, max_fields=16) as form:
        file, model = form.get("file"), form.get("model")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "no sound file in the field file", param="file")
        for name, value in form.multi_items():
            if name not in ("file", "model") and value not in _SERVED.get(name, ("",)):
                allowed = " or ".join(_SERVED.get(name, ()))
                hint = f"it may be {allowed}" if allowed else "leave it out"
                raise ApiError(400, f"{name} {value!r} is not served here; {hint}", param=name)
        content = await file.read()
        return Sound(
            content, file.filename or "the file", str(model) if model else None, form.get("response_format") == "text"
        )


def heard(sound: Sound, bundle: Bundle, runner: Seq2SeqRunner) -> Iterator[Answer]:
    """What is said in each part of it."""
    with tempfile.TemporaryDirectory(prefix="qft-sound-") as folder:
        path = Path(folder, "sound")
        path.write_bytes(sound.content)
        try:
            yield from bundle.heard(str(path), runner)
        except InputError as error:
            raise ApiError(400, str(error).replace(str(path), sound.name), param="file") from None
