"""Command lines of llm.c are understood."""
from dev.run.flags import parse_flags

LLMC = ("-i data/train_*.bin -j data/val_*.bin -o log_gpt2_124M -v 250 -s 20000 -g 144 -h 1 -b 64 -t 1024 -d 524288 "
        "-r 0 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -y 1 -e d12")  # scripts/run_gpt2_124M.sh
LLMC_GPT3 = "-k cosine -ge 1 -nk 5 -nm 50000 -sl 7.0 -sg 7.0 -x 572204 -e gpt3:c768"  # some of scripts/run_gpt3_125M.sh


def test_arguments_of_llmc():
    flags = parse_flags(LLMC.split())
    assert (flags.micro_batches, flags.warmup_iters, flags.model, flags.resume) == (8, 700, "d12", 1)
    assert (flags.learning_rate, flags.learning_rate_decay_frac, flags.weight_decay) == (0.0006, 0, 0.1)
    flags = parse_flags(LLMC_GPT3.split())
    assert (flags.checkpoints_keep, flags.major_checkpoint_every, flags.skip_update_gradz) == (5, 50000, 7)


def test_ignored_flags_are_named_once(train):
    ignored = "-f 1 -ge 1 -lg 10 -pr 0 -pg 8 -pm mpi -pi . -pf . -ps ."
    printed = train(f"-x 1 {ignored}")
    line, = (line for line in printed.splitlines() if line.startswith("ignored"))
    assert line.split(": ")[1].split() == ignored.split()[::2]
    assert "\nignored" not in train("-x 1 --overwrite 1")
