"""What an export for vllm-omni may be asked for. No torch in here: --help shows it."""

from typing import Literal, get_args

Folder = Literal["Lance_3B", "Lance_3B_Video"]
FOLDERS = get_args(Folder)
Parts = Literal["link", "copy"]
PARTS = get_args(Parts)
