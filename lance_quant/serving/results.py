"""Results that wait to be fetched: pictures by their URL, and jobs that make clips, in memory and bounded."""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from lance_quant.serving.engine import Job

Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclass
class Kept:
    """A file's content and type."""

    content: bytes
    media_type: str


class Results:
    """Files by a name that cannot be guessed; of more than `most` bytes the oldest go."""

    def __init__(self, most: int):
        self._most, self._size = most, 0
        self._files: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, content: bytes, media_type: str, suffix: str) -> str:
        """Keep a file; its name."""
        name = f"{secrets.token_urlsafe(18)}.{suffix}"
        with self._lock:
            self._files[name] = Kept(content, media_type)
            self._size += len(content)
            while self._size > self._most and len(self._files) > 1:
                self._size -= len(self._files.popitem(last=False)[1].content)
        return name

    def get(self, name: str) -> Kept | None:
        """The file, while it is kept."""
        with self._lock:
            return self._files.get(name)

    def drop(self, name: str) -> None:
        """Forget a file."""
        with self._lock:
            found = self._files.pop(name, None)
            self._size -= len(found.content) if found else 0


@dataclass
class VideoJob:
    """A clip in the making, as the OpenAI API shows it."""

    model: str
    prompt: str
    size: str
    seconds: str
    job: Job[bytes]
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(16)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    file: str = ""

    @property
    def status(self) -> Status:
        """How far it is."""
        if self.job.future.done():
            return "failed" if self.job.future.exception() is not None else "completed"
        return "queued" if self.job.started is None else "in_progress"

    def as_json(self) -> dict[str, Any]:
        """The video object."""
        status, progress = self.status, self.job.progress
        error = self.job.future.exception() if status == "failed" else None
        percent = 100 if status == "completed" else round(100 * progress.done / progress.total) if progress else 0
        return {"id": self.id, "object": "video", "model": self.model, "status": status, "progress": percent,
                "created_at": self.created_at, "prompt": self.prompt, "size": self.size, "seconds": self.seconds,
                "error": None if error is None else {"code": type(error).__name__, "message": str(error)}}
