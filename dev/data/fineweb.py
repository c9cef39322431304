"""
FineWeb and FineWeb-Edu, https://huggingface.co/datasets/HuggingFaceFW/fineweb: text from the web, filtered.

    python dev/data/fineweb.py -t edu -v 10B            # data/edu_fineweb10B: 10^10 tokens, 27 GB to fetch
    python dev/data/fineweb.py -t classic -v 10B -n 5   # data/fineweb10B: validation, and 5 shards for training
    python dev/data/fineweb.py --ready -n 5             # data/edu_fineweb100B: the same, already tokenised

Writes {fineweb,edu_fineweb}_{val,train}_000000.bin …; shard 0 is for validation, a document may go on in the next
shard. Hugging Face's parquet files are fetched one by one, as they are needed, into parquet/ beside the shards; with
more shards to come they will be needed again, otherwise they can be deleted. Needs pyarrow, except with --ready.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import re

from dev.data.command_line import add_common_flags, run
from dev.data.download import HF, download
from dev.data.readers import read_parquet
from dev.data.shards import ShardWriter, check_shard
from dev.data.tokenising import pieces, tokenize
from dev.run.arguments import Parser
from dev.run.console import shown
from dev.run.reading import LARGEST_JSON, read_json, reason

REPOSITORIES = {"classic": ("fineweb", "HuggingFaceFW/fineweb"), "edu": ("edu_fineweb", "HuggingFaceFW/fineweb-edu")}
LISTING = [{"path": str, "size": int, "lfs?": ({"oid?": str}, None)}]
READY = "karpathy/fineweb-edu-100B-gpt2-token-shards"  # 100 B tokens of FineWeb-Edu: val_000000, train_000001 … 001001


def list_parquet(url, path):
    """[(path in the repository, bytes, sha256 or None), …], of the version that was the newest when first asked for."""
    download(url, path, most=LARGEST_JSON)
    try:
        entries = [e for e in read_json(path, LISTING) if e["path"].endswith(".parquet")]
        for e in entries:
            if e["size"] < 0 or not re.fullmatch(r"[\w./-]+", e["path"]):
                raise ValueError(f"a file of {e['size']} bytes is called {shown(e['path'])!r}")
    except ValueError as e:
        path.unlink()
        raise ValueError(f"{url} answers with something else than a list of files: {reason(e)}") from None
    return sorted((e["path"], e["size"], (e.get("lfs") or {}).get("oid")) for e in entries)


def stream(files, url, folder):
    """The pieces for tokenize(): the documents of all files."""
    for name, size, sha256 in files:
        path = download(f"{url}/{name}", folder / name.rpartition("/")[2], size, sha256)
        with open(path, "rb") as f:
            for text in read_parquet(f, "text", path):
                for begins, piece in pieces([text or ""]):
                    yield "", begins, piece


def fetch_ready(base_url, folder, shards):
    names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    for name in names:
        path = download(f"{base_url}/datasets/{READY}/resolve/main/{name}", folder / name)
        try:
            print(f"complete: {name} ({check_shard(path):,} tokens)")
        except ValueError:
            path.unlink()
            raise


def main():
    parser = Parser(description="FineWeb into token shards")
    parser.add_argument("-t", "--type", choices=("classic", "edu"), default="classic")
    parser.add_argument("-v", "--version", choices=("10B", "100B"), default="10B", help="which sample, in tokens")
    parser.add_argument("-n", "--num_shards", type=int, help="shards for training (default: all there are)")
    parser.add_argument("--ready", action="store_true", help="fetch FineWeb-Edu 100B as shards that are made already")
    parser.add_argument("--base_url", default=HF, help="Hugging Face, or a mirror of it")
    add_common_flags(parser, workers=True, shard_size=10**8)
    args = parser.parse_args()
    if args.num_shards is not None and args.num_shards < 1:
        raise ValueError(f"-n is 1 or more, not {args.num_shards}")
    if args.ready:
        fetch_ready(args.base_url, args.data_dir / "edu_fineweb100B", min(args.num_shards or 1001, 1001))
        return

    name, repository = REPOSITORIES[args.type]
    folder = args.data_dir / f"{name}{args.version}"
    sample = f"sample/{args.version}T"
    url = f"{args.base_url}/api/datasets/{repository}/tree/main/{sample}"
    files = list_parquet(url, folder / "parquet" / "files.json")
    if not files:
        raise ValueError(f"no parquet files in {url}")
    writer = ShardWriter(folder, name, "", args.shard_size)
    shards = None if args.num_shards is None else args.num_shards + 1
    wanted = shards or int(args.version[:-1]) * 10**9 / args.shard_size  # roughly; for the time that is left
    tokenize(
        stream(files, f"{args.base_url}/datasets/{repository}/resolve/main", folder / "parquet"),
        {"": writer},
        [files, args.shard_size],
        args.tokenizer,
        args.workers,
        lambda: min(1, (writer.shards + writer.count / args.shard_size) / wanted),
        shards,
    )


if __name__ == "__main__":
    run(main)
