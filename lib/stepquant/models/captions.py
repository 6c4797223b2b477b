"""Captions: texts without a video, one per line of a text file."""

from pathlib import Path

from stepquant.errors import DamagedFile, InvalidInput, MissingFile


def read_captions(path: Path) -> list[str]:
    """Read the captions of a text file.

    Args:
        path: UTF-8 text. Blank lines, and spaces around a caption, are left out.

    Returns:
        The captions in file order, at least one; each once, because the same text again would only repeat its tokens.

    Raises:
        MissingFile: there is no such file.
        DamagedFile: it is not UTF-8 text.
        InvalidInput: it has no caption, or is a JSONL file.
    """
    where = f"trajectories.text_prompts: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise MissingFile(f"{where}: no such file; expected a text file with one caption per line") from None
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    captions = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not captions:
        raise InvalidInput(f"{where}: the file is empty; expected at least one caption")
    if captions[0].startswith("{"):
        raise InvalidInput(f"{where}: the first line looks like JSON; expected plain text with one caption per line")
    return captions
