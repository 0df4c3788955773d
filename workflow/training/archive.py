"""What a file of torch.save must be before torch may read it.

torch.load checks no CRC, and `weights_only=True` still lets a pickle build what it likes out of a
few permitted calls. So the archive's directory, every record's CRC and every call of the pickle are
looked at first, and nothing is unpacked: torch stores its records as they are.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

from workflow.errors import CheckpointError, DamagedError

# All that a checkpoint's pickle may call. Each makes a view of a record, or an empty dict.
CALLS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Float|Double|Half|BFloat16|Byte|Char|Short|Int|Long|Bool)Storage"
)
MOST_OPERATIONS = 500_000  # of a pickle; the 135M's takes 20,000. Each can make a small object
LOOKS = (  # how a file starts, and what it then is
    (rb"$", "it is empty"),
    (rb"version https://git-lfs", "it is a git-LFS pointer, not the file: type git lfs pull"),
    (rb"\s*<(!doctype|html|head|\?xml)", "it is an HTML page, perhaps of a failed download"),
    (rb"GGUF", "it is a GGUF file"),
    (rb".{8}\{\"", "it is a safetensors file"),
    (rb"\x1f\x8b", "it is compressed with gzip"),
    (rb"\x80[\x02-\x05]", "it is a plain pickle, which could run anything"),
    (rb"[\t\n\r -~]{4,64}$", "it is a text file"),
)


def check_archive(path: Path, do: str = "choose another") -> None:
    """Reads all of a torch archive and builds nothing of it.

    do: the mend that an error names. Raises DamagedError, naming the record, for a file that is
    none, or damaged, or not of tensors and plain values alone; CheckpointError where there is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if wrong := suspicious(records, path.stat().st_size):
                raise DamagedError(path, f"{wrong}, nothing of it was unpacked", do)
            if damaged := archive.testzip():
                raise DamagedError(path, f"record {damaged} is damaged", do)
            for record in records:
                if record.filename.endswith(".pkl") and (wrong := harm(archive.read(record))):
                    raise DamagedError(path, f"{wrong}, nothing of it was run", do)
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file", do) from None
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error.strerror or error})", do) from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        raise DamagedError(path, looks_like(path) or f"it is damaged ({error})", do) from None


def suspicious(records: list[zipfile.ZipInfo], size: int) -> str | None:
    """What in an archive's directory torch.save never writes, in words."""
    names = [record.filename for record in records]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else 0
    if twice:
        return f"record {twice[0]!r} stands twice"
    tops = {name.partition("/")[0] for name in names}
    odd = [name for name in names if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name)]
    odd += [name for name in names if ".." in name.split("/")]
    if odd or len(tops) > 1:
        return f"record {(odd or names)[0]!r} has a name that torch never gives"
    packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
    packed += [r.filename for r in records if r.compress_size != r.file_size]
    if packed:
        return f"record {packed[0]!r} is compressed, which torch never does"
    total = sum(record.file_size for record in records)
    if total > size:
        return f"its records claim {total} bytes, the file has {size}"
    return None


def harm(pickle: bytes) -> str | None:
    """What in a pickle is more than tensors and plain values, in words."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if number > MOST_OPERATIONS:
            return f"its pickle has over {MOST_OPERATIONS} operations"
        if operation.name == "GLOBAL" and not CALLS.fullmatch(argument):
            return f"its pickle calls {argument.replace(' ', '.')}, which makes no tensor"
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            return f"its pickle has the operation {operation.name}, which torch never writes"
    return None


def looks_like(path: Path) -> str | None:
    """What a file that is no archive seems to be, in words."""
    with open(path, "rb") as file:
        start = file.read(64)
    for pattern, words in LOOKS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return words
    return None
