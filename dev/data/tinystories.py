"""
TinyStories, https://huggingface.co/datasets/roneneldan/TinyStories: stories that a small model can learn to tell.

    python dev/data/tinystories.py      # fetches 1.6 GB, unpacks and tokenises it

Writes data/tinystories/TinyStories_{val,train}.bin, about 19 and 926 million tokens. The first of the 50 files is for
validation. The stories of a file are shuffled, always in the same way; the files keep their order.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import io
import random
import shutil

from dev.data.command_line import add_common_flags, run, show
from dev.data.download import HF, download, require_room
from dev.data.readers import json_items, open_tar, unpacking
from dev.data.shards import ShardWriter
from dev.data.tokenising import pieces, tokenize
from dev.run.arguments import Parser
from dev.run.console import shown
from dev.run.files import NewFile, open_file
from dev.run.reading import misfit, reason

URL = f"{HF}/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"


def unpack(archive, folder):
    """The .json files of the archive, in the order of their names. What is unpacked already is left as it is."""
    marker = folder / ".complete"
    if not marker.exists():
        print(f"unpacking {show(archive)} to {show(folder)}")
        folder.mkdir(exist_ok=True)
        with unpacking(archive), open_tar(archive) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name.endswith(".json") and not name.startswith("."):
                    require_room(folder, member.size)
                    with NewFile(folder / name) as f:
                        shutil.copyfileobj(tar.extractfile(member), f, 1 << 20)
        marker.touch()
    return sorted(folder.glob("*.json"))


def stories(path):
    """The stories of a file, a JSON list of objects; read one by one, which takes a fraction of json.load's memory."""
    result = []
    try:
        with open_file(path) as file:
            for where, item in json_items(io.TextIOWrapper(file, encoding="utf-8"), path):
                if problem := misfit(item, {"story": str}, where):
                    raise ValueError(problem)
                result.append(item["story"])
        if not result:
            raise ValueError("there is none")
    except ValueError as e:
        raise ValueError(f"{shown(path)} is no JSON list of stories: {reason(e)}") from None
    return result


def stream(files, read):
    """
    The pieces for tokenize(). Within a split, file i is shuffled with the seed 1337 + i, as llm.c does it. Files that
    have been gone through are added to the list `read`.
    """
    for split, paths in (("val", files[:1]), ("train", files[1:])):
        for i, path in enumerate(paths):
            texts = stories(path)
            random.Random(1337 + i).shuffle(texts)
            for text in texts:
                for begins, piece in pieces([text.strip()]):
                    yield split, begins, piece
            read.append(path)


def main():
    parser = Parser(description="TinyStories into token shards")
    parser.add_argument("--url", default=URL, help="where TinyStories_all_data.tar.gz comes from")
    add_common_flags(parser, workers=True)
    args = parser.parse_args()
    folder = args.data_dir / "tinystories"

    archive = download(args.url, folder / "TinyStories_all_data.tar.gz")
    files = unpack(archive, folder / "TinyStories_all_data")
    if not files:
        raise ValueError(f"no .json files in {archive}\n---> HINT: delete it and run again")
    writers = {split: ShardWriter(folder, "TinyStories", split) for split in ("val", "train")}
    job = [(p.name, p.stat().st_size) for p in files]
    read = []
    tokenize(stream(files, read), writers, job, args.tokenizer, args.workers, lambda: len(read) / len(files))


if __name__ == "__main__":
    run(main)
