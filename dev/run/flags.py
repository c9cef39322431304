"""
The trainer's command line.
"""
import argparse
import functools
import math
import sys

from dev.run.arguments import Defaults, Parser
from dev.run.data import DEFAULT
from dev.run.processes import launched

# the flags that are an engine's options, by its device: others are ignored there
OPTIONS = {"cpu": {"matmul": "--matmul"}, "cuda": {"tf32": "-f", "attention": "--attention"}}

# the flags on which a run's numbers depend: what changed is said where one goes on
SETTINGS = "-e -b -t -d -k -l -u -q -c --beta1 --beta2 --eps --grad_clip -sl -sg -a".split()


def add_device(parser):
    """The flags by which every program chooses an engine"""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what computes")
    parser.add_argument("--precision", choices=("fp32", "bf16"),
                        help="what products read; default: fp32, on a GPU bf16")


def explain(error, message):
    """The parser's error, but for a bare -h, by which most programs mean help"""
    bare = message.startswith("argument -h/") and "expected one argument" in message
    error("-h is HellaSwag, as in llm.c, and needs a 1 or a 0" if bare else message)


def parse_flags(argv):
    """The flags as attributes, the micro-batches of a step, options: an engine's own flags, and settings.
    ValueError for values that make no sense"""
    parser = Parser(
        "train_gpt2.py", add_help=False, formatter_class=Defaults, allow_abbrev=False,
        description="Trains GPT-2. Flags have the short names of llm.c's trainer; 0 is off wherever one says `every`.")
    ranges, destinations = {}, {}

    def flag(names, default, text, kind=None, least=0, below=math.inf, **more):
        action = parser.add_argument(*names.split(), default=default, type=kind or type(default), help=text, **more)
        ranges[action.dest], destinations[names.split()[0]] = (least, below), action.dest
    parser.add_argument("--help", action="help", help="show this help")
    parser.error = functools.partial(explain, parser.error)
    # data and model
    flag("-i --input_bin", DEFAULT[0], "train shards, a glob pattern or a folder")
    flag("-j --input_val_bin", DEFAULT[1], "validation shards, a glob pattern")
    flag("-e --model", "data/gpt2_124M.bin", "a checkpoint, a folder of a run or of Hugging Face's, or a descriptor "
         "for random weights: d6, d12, gpt3:c768 or, of any shape, gpt2:l4c256h4: layers, channels, heads; after it "
         "t512: longest sequence, v300: vocabulary")
    # output folder and checkpoints
    flag("-o --output_dir", None, "folder for main.log and checkpoints", str)
    flag("-n --checkpoint_every", 0, "write a checkpoint every so many steps; with -o the end is always saved")
    flag("-nk --checkpoints_keep", 0, "keep the newest so many, 0 = all")
    flag("-nm --major_checkpoint_every", 0, "checkpoints at multiples of this are never removed")
    flag("-y --resume", 0, "1: go on from the newest complete checkpoint in -o", choices=(0, 1))
    flag("-w --master_weights", None, "1: state files have the float32 weights, as llm.c's, and the model's file what "
         "products read (default: 0, on a GPU 1)", int, choices=(0, 1))
    flag("--overwrite", 0, "1: begin anew in a folder -o that holds a run, and remove that", choices=(0, 1))
    # batch
    flag("-b --batch_size", 4, "sequences in a micro-batch", least=1)
    flag("-t --sequence_length", 64, "tokens in a sequence", least=1)
    flag("-d --total_batch_size", None, "tokens in a step; more than -b times -t of every process means gradient "
         "accumulation", int)
    # optimisation
    flag("-x --num_iterations", 40, "steps, -1 = one epoch", least=-1)
    flag("-k --lr_scheduler", "cosine", "learning rate schedule", choices=("cosine", "linear", "constant", "wsd"))
    flag("-l --learning_rate", 1e-4, "the highest learning rate")
    flag("-u --warmup_iters", 0, "steps in which the learning rate rises to it")
    flag("-q --learning_rate_decay_frac", 1.0, "the final learning rate, as a fraction of it")
    flag("-c --weight_decay", 0.0, "AdamW's weight decay, on matrices only")
    flag("--beta1", 0.9, "AdamW's decay of the first moment", below=1)
    flag("--beta2", 0.999, "AdamW's decay of the second moment", below=1)
    flag("--eps", 1e-8, "AdamW's epsilon")
    flag("--grad_clip", 0.0, "scale gradients down to this global norm, 0 = never")
    flag("-sl --skip_update_lossz", 0.0, "skip an update whose loss is so many standard deviations too high, 0 = never")
    flag("-sg --skip_update_gradz", 0.0, "the same for the gradient norm")
    flag("--skip_bad", 0, "1: pass over batches that are damaged, instead of ending at the first one", choices=(0, 1))
    flag("-a --overfit_single_batch", 0, "1: train on the first validation batch only", choices=(0, 1))
    flag("-r --recompute", 1, "what the backward pass computes again: 1 GELU, 2 LayerNorm too", choices=(0, 1, 2))
    # once in a while
    flag("-v --val_loss_every", 10, "estimate the validation loss every so many steps")
    flag("-m --val_max_steps", 5, "batches of such an estimate, -1 = all", least=-1)
    flag("-s --sample_every", 20, "write a text every so many steps")
    flag("-g --gen_tokens", 64, "tokens of such a text", least=1)
    flag("--prompt", "", "how the text begins")
    flag("--temperature", 1.0, "below 1 likely tokens become more likely, 0 = always the most likely one")
    flag("--top_k", 0, "draw from the k most likely tokens, 0 = all")
    flag("--top_p", 0.0, "draw from the most likely tokens that have this probability together, 0 = all")
    flag("--seed", 1337, "of the sampler")
    # HellaSwag
    flag("-h --hellaswag_eval", 0, "1: HellaSwag's accuracy with every validation", choices=(0, 1))
    flag("--eval_examples", 0, "only the first so many examples of HellaSwag, 0 = all")
    # the machine
    add_device(parser)
    flag("--matmul", None, "on a CPU: products by our kernels or NumPy's BLAS", str, choices=("auto", "numba", "blas"))
    flag("-f --tf32", None, "on a GPU with fp32: products in TF32 (default: 1)", int, choices=(0, 1))
    flag("--attention", None, "on a GPU: cuDNN's kernels or our own", str, choices=("auto", "cudnn", "flash", "own"))
    flag("--log_every", 1, "print every so many steps; main.log keeps them all", least=1)
    flag("--profile", 0, "1: a table of the time in each kernel at the end", choices=(0, 1))
    # several processes
    flag("-pn --num_processes", launched(), "processes, which mpirun or srun starts", least=1)
    flag("-z --zero_stage", 0, "1: processes share AdamW's moments out", choices=(0, 1))
    ignored = ["-ge", "-lg", "-pr", "-pg", "-pm", "-pi", "-pf", "-ps", "-pp"]
    for name in ignored:
        parser.add_argument(name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    flags.argv, flags.note = list(sys.argv[1:] if argv is None else argv), None
    flags.options = {name: getattr(flags, name) for name in OPTIONS[flags.device] if getattr(flags, name) is not None}
    if flags.master_weights is None:
        flags.master_weights = int(flags.device == "cuda")
    others = [(name, short) for device, names in OPTIONS.items() if device != flags.device
              for name, short in names.items()]
    flags.ignored = [short for name, short in others if getattr(flags, name) is not None]
    flags.ignored += [name for name in ignored if hasattr(flags, name.strip("-"))]
    for name, (least, below) in ranges.items():
        value = getattr(flags, name)
        if isinstance(value, (int, float)) and not least <= value < below:
            raise ValueError(f"--{name} must lie in [{least}, {below}), not be {value}")
    if flags.val_max_steps == 0:
        raise ValueError("-m 0 leaves nothing to estimate\n---> HINT: -v 0 turns validation off")
    if (flags.resume or flags.checkpoint_every) and not flags.output_dir:
        raise ValueError("checkpoints need a folder\n---> HINT: name one with -o")
    if flags.output_dir and not flags.checkpoint_every:
        flags.checkpoint_every = sys.maxsize  # the end is saved, and no step before it
    tokens = flags.batch_size * flags.sequence_length * flags.num_processes
    flags.total_batch_size = flags.total_batch_size or tokens
    flags.micro_batches = flags.total_batch_size // tokens
    if flags.total_batch_size % tokens:
        of_all = f" of {flags.num_processes} processes" if flags.num_processes > 1 else ""
        fits = max(1, round(flags.total_batch_size / tokens)) * tokens
        raise ValueError(f"a total batch of {flags.total_batch_size:,} tokens is not a multiple of the {tokens:,} of a "
                         f"micro-batch{of_all}\n---> HINT: use -d {fits}")
    flags.settings = {name: getattr(flags, destinations[name]) for name in SETTINGS}
    flags.model_given = flags.model != parser.get_default("model")
    return flags
