"""The command line: ``ccp`` with the commands that ``ccp --help`` lists."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ccp_ext.errors import InputError

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``ccp``; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"ccp {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"ccp {options.command}: {name}{error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"ccp {options.command}: interrupted{options.after_interrupt}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _info(options: argparse.Namespace) -> None:
    import platform

    import torch

    import ccp_ext

    built = ccp_ext.build_info()
    kernels = "CPU"
    if built["cuda"]:
        kernels += f" and CUDA (nvcc {built['nvcc']}; {' '.join(built['architectures'])})"
    for name, value in {
        "ccp_ext": ccp_ext.__version__,
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA: {torch.version.cuda or 'none'})",
        "kernels built": kernels,
        "built with": f"torch {built['torch']}, {built['compiler']}",
        "usable devices": ", ".join(ccp_ext.usable_devices()),
    }.items():
        print(f"{name + ':':16}{value}")


def _criteria(options: argparse.Namespace) -> None:
    from ccp_ext import criteria

    for name in criteria.names():
        criterion = criteria.get(name)
        lines = [criterion.summary, f"source: {criterion.source}"]
        lines.append(f"allocation: {criterion.allocation}")
        if criterion.uses:
            lines.append(f"options: {', '.join(criterion.uses)}")
        if criterion.note:
            lines.append(f"note: {criterion.note}")
        print(f"{name:16}" + f"\n{'':16}".join(lines))


def _prune(options: argparse.Namespace) -> None:
    from ccp_ext import criteria, pipeline
    from ccp_ext.report import table

    settings = pipeline.PruneSettings(
        model=options.model,
        weights=options.weights,
        data=options.data,
        mean=options.mean,
        std=options.std,
        macs=options.macs,
        params=options.params,
        activations=options.activations,
        latency=options.latency,
        ratio=options.ratio,
        latency_table=options.latency_table,
        allocation=options.allocation,
        multiple=options.multiple,
        minimum=options.minimum,
        rounds=options.rounds,
        criterion=options.criterion,
        options=criteria.Options(
            site=options.site,
            curvature=options.curvature,
            rows=options.rows,
            temperature=options.temperature,
            first_order=options.first_order,
            diagonal=options.diagonal,
            normalise=options.normalise,
            greedy=options.greedy,
            ridge=options.ridge,
            seed=options.seed,
        ),
        scope=options.scope,
        images=options.images,
        batch_size=options.batch_size,
        repair=options.repair,
        repair_images=options.repair_images,
        repair_memory=options.repair_memory,
        finetune=_schedule(options, seed=options.seed),
        distil=options.distil,
        auxiliary_heads=options.auxiliary_heads,
        seed=options.seed,
    )
    report = pipeline.run(
        settings, options.output, device=_device(options.device), progress=_progress(options)
    )
    print(table(report["stages"]))


def _schedule(options: argparse.Namespace, **settings: Any) -> Any:
    """The FinetuneConfig of the options, or None without epochs."""
    from ccp_ext.finetune import FinetuneConfig

    if not options.epochs:
        return None
    return FinetuneConfig(**{name: getattr(options, name) for name in _SCHEDULE}, **settings)


def _evaluate(options: argparse.Namespace) -> None:
    from ccp_ext import datasets, measure
    from ccp_ext.checkpoints import load_model, model_factory
    from ccp_ext.evaluation import evaluate
    from ccp_ext.report import table

    images = datasets.load(options.data, options.split, mean=options.mean, std=options.std)
    factory = model_factory(options.model, images.num_classes, images.images.shape[1])
    model = load_model(factory, options.weights).to(_device(options.device))
    result = evaluate(model, images, batch_size=options.batch_size, progress=_progress(options))
    example = images.normalise(images.images[:1]).to(next(model.parameters()).device)
    print(
        table(
            [
                {
                    "model": options.model,
                    "images": result.count,
                    "accuracy %": result.accuracy,
                    "loss": f"{result.loss:.4f}",
                    "MACs": measure.macs(model, example),
                    "parameters": measure.parameters(model),
                }
            ]
        )
    )


def _compare(options: argparse.Namespace) -> None:
    from ccp_ext import compare
    from ccp_ext.report import page, summary, table

    settings = compare.CompareSettings(
        model=options.model,
        weights=options.weights,
        data=options.data,
        mean=options.mean,
        std=options.std,
        criteria=options.criteria,
        macs=options.macs,
        params=options.params,
        seeds=options.seeds,
        repair=options.repair,
        allocation=options.allocation,
        multiple=options.multiple,
        scope=options.scope,
        images=options.images,
        batch_size=options.batch_size,
        repair_images=options.repair_images,
        repair_memory=options.repair_memory,
        finetune=_schedule(options),
        distil=options.distil,
    )
    devices = [_device(name) for name in options.device.split(",")]
    result = compare.compare(settings, options.output, devices=devices, progress=_progress(options))
    for title, rows in summary.tables(result):
        print(f"\n{title}\n{table(rows)}")
    print(f"\n{summary.explanation(result)}\n{page.write(options.output)}")


def _report(options: argparse.Namespace) -> None:
    from ccp_ext.report import page

    print(page.write(options.folder, options.output))


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    checkout = str(Path(__file__).resolve().parent.parent)
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    try:
        from benchmarks import suite
    except ImportError as error:
        raise InputError(
            f"the benchmarks are not part of an installation ({error}); run it from a checkout"
        ) from error
    suite.main(options.arguments)


def _demo(options: argparse.Namespace) -> None:
    from ccp_ext import demo

    demo.run(options.output, progress=_progress(options))


def _device(name: str) -> str:
    import torch

    import ccp_ext

    if name == "auto":
        return ccp_ext.usable_devices()[-1]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {d.split(":")[0] for d in ccp_ext.usable_devices()}:
        raise InputError(
            f"device must be auto or one of {', '.join(ccp_ext.usable_devices())}; got {name!r}"
        )
    return name


def _progress(options: argparse.Namespace) -> bool:
    return not options.quiet


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ccp", description="Remove whole channels of convolutional networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, summary, after_interrupt="", **options):
        added = commands.add_parser(name, help=summary, description=summary, **options)
        added.set_defaults(run=run, after_interrupt=after_interrupt)
        return added

    command("info", _info, "versions, what was built, which devices are usable")
    command("criteria", _criteria, "the pruning criteria, with their sources")

    prune = command(
        "prune",
        _prune,
        "prune a model, repair it, evaluate it and save it",
        "; the same command goes on from here",
    )
    _add_input(prune)
    prune.add_argument("--output", required=True, help="folder for the plan, slim model and report")
    budget = prune.add_argument_group("budget (exactly one)").add_mutually_exclusive_group(
        required=True
    )
    budget.add_argument(
        "--macs", type=_count_or_share, help="share of the MACs to keep, or a count"
    )
    budget.add_argument(
        "--params", type=_count_or_share, help="share of the parameters to keep, or a count"
    )
    budget.add_argument(
        "--activations",
        type=_count_or_share,
        help="share of the outputs of all layers to keep, or a count of elements",
    )
    budget.add_argument(
        "--latency",
        type=_share_or_time,
        help="share of the time of a forward pass to keep, or milliseconds such as 2.5ms",
    )
    budget.add_argument("--ratio", type=float, help="share of every group's channels to remove")
    prune.add_argument(
        "--latency-table",
        help="file of a latency table (default: measured for one image on the device)",
    )
    prune.add_argument(
        "--allocation",
        default="auto",
        choices=("auto", "uniform", "optimal", "joint"),
        help="uniform: one share for all groups; optimal: what costs least by the criterion; "
        "joint: that, improved on the cost of the whole network (ccp, ccp-paper); auto (default): "
        "uniform or optimal, as `ccp criteria` says",
    )
    prune.add_argument("--multiple", type=int, default=1, help="kept channels divisible by this")
    prune.add_argument("--minimum", type=int, default=1, help="least kept channels of a group")
    prune.add_argument(
        "--rounds", type=int, default=1, help="steps to the budget, with statistics before each"
    )
    prune.add_argument(
        "--scope",
        default="inner",
        choices=("inner", "coupled", "all"),
        help="channels inside blocks (default), those of residual streams, or both",
    )

    choice = prune.add_argument_group("criterion")
    choice.add_argument("--criterion", default="taylor", help="see `ccp criteria` (default taylor)")
    choice.add_argument("--curvature", choices=("logits", "sampled", "empirical", "exact"))
    choice.add_argument("--site", choices=("gate", "weight"))
    choice.add_argument("--rows", type=int, help="labels or projections drawn per image")
    choice.add_argument("--temperature", type=float, help="of the labels drawn")
    choice.add_argument(
        "--first-order", action=argparse.BooleanOptionalAction, help="use the linear term u"
    )
    choice.add_argument("--diagonal", action="store_true", help="drop the pairwise terms")
    choice.add_argument(
        "--normalise",
        choices=("memory", "macs", "none"),
        help="divide scores by this (group-fisher)",
    )
    choice.add_argument(
        "--greedy", action="store_true", help="choose as published, not by the solver (qsfm)"
    )
    choice.add_argument("--ridge", type=float, help="of the refits that a criterion foresees")
    choice.add_argument("--images", type=int, default=10_000, help="images for the statistics")
    choice.add_argument("--seed", type=int, default=0)

    repair = prune.add_argument_group("repair")
    repair.add_argument(
        "--repair",
        default="refit",
        help="none, or steps of fold, refit-linear, refit, refit-modules, batchnorm joined by + "
        "(default refit: least squares with Gauss-Newton steps, which take minutes; refit-linear "
        "is several times faster)",
    )
    _add_repair_images(repair)
    tuning = _add_schedule(prune)
    tuning.add_argument(
        "--auxiliary-heads",
        type=int,
        help="classifiers inside the network (default: the criterion's, which are 3 of ccp-ac)",
    )

    evaluate = command("evaluate", _evaluate, "accuracy, loss and size of a plain or slim model")
    _add_input(evaluate)
    evaluate.add_argument("--split", default="test", choices=("train", "test", "all"))

    compare = command(
        "compare",
        _compare,
        "criteria side by side at equal cost, over budgets, repairs and seeds",
        "; the same command goes on from here",
    )
    _add_input(
        compare, device="cpu, cuda, ... (default auto); several joined by commas: a process each"
    )
    compare.add_argument(
        "--output",
        required=True,
        help="folder for the rows, tables and page; may hold a comparison of other criteria, "
        "budgets, repairs or seeds with the same schedule, whose rows are kept",
    )
    compare.add_argument(
        "--criteria",
        type=_list_of(str),
        default=("taylor", "refit-loss", "ccp", "l1"),
        help="see `ccp criteria`; options follow after colons, such as "
        "ccp,ccp:curvature=sampled:diagonal,l1 (default taylor,refit-loss,ccp,l1; random is "
        "always compared)",
    )
    budget = compare.add_argument_group("budgets (of one kind)").add_mutually_exclusive_group(
        required=True
    )
    budget.add_argument(
        "--macs",
        type=_list_of(_count_or_share),
        default=(),
        help="shares of the MACs to keep, or counts, such as 0.7,0.5,0.3",
    )
    budget.add_argument(
        "--params",
        type=_list_of(_count_or_share),
        default=(),
        help="shares of the parameters to keep, or counts",
    )
    compare.add_argument(
        "--allocation",
        default="auto",
        choices=("auto", "uniform", "optimal"),
        help="of the criteria that do not say their own, as ccp:allocation=optimal does; auto "
        "(default): as `ccp criteria` says",
    )
    compare.add_argument("--multiple", type=int, default=1, help="kept channels divisible by this")
    compare.add_argument(
        "--scope",
        default="inner",
        choices=("inner", "coupled", "all"),
        help="channels inside blocks (default), those of residual streams, or both",
    )
    compare.add_argument(
        "--seeds", type=_list_of(int), default=(0, 1, 2), help="such as 0,1,2 (the default)"
    )
    compare.add_argument("--images", type=int, default=10_000, help="images for the statistics")
    compare.add_argument(
        "--repair",
        type=_list_of(str),
        default=("refit-linear",),
        help="none, or steps of fold, refit-linear, refit, refit-modules, batchnorm, finetune "
        "joined by +, such as none,batchnorm,refit+finetune (default refit-linear: refit without "
        "its Gauss-Newton steps, several times faster)",
    )
    _add_repair_images(compare)
    _add_schedule(compare)

    report = command("report", _report, "one HTML page of a folder of `ccp prune` or `ccp compare`")
    report.add_argument("folder", help="the --output of the run")
    report.add_argument("--output", help="file to write (default report.html in the folder)")

    # Its options are the benchmarks' own, so here they are words like others.
    bench = command(
        "bench",
        _bench,
        "time every operator beside its rivals (in a checkout)",
        add_help=False,
        prefix_chars="+",
    )
    bench.add_argument("arguments", nargs="*", help="as of `python -m benchmarks`")

    demo = command("demo", _demo, "train, prune and fine-tune a small ResNet on digits")
    demo.add_argument("--output", default="demo_output", help="folder for the slim model")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


# Options of FinetuneConfig that the command line offers.
_SCHEDULE = (
    "epochs",
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup_epochs",
    "weight_decay",
    "label_smoothing",
    "mixup",
    "ema_decay",
    "freeze_batchnorm",
    "augment",
    "channels_last",
    "amp",
)


def _add_schedule(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    tuning = command.add_argument_group("fine-tuning")
    tuning.add_argument("--epochs", type=int, default=0, help="default none")
    tuning.add_argument("--learning-rate", type=float, default=0.01, help="its peak (default 0.01)")
    tuning.add_argument("--schedule", choices=("cosine", "step"), default="cosine")
    tuning.add_argument("--warmup-epochs", type=float, default=0.0)
    tuning.add_argument("--weight-decay", type=float, default=1e-4)
    tuning.add_argument("--label-smoothing", type=float, default=0.0)
    tuning.add_argument("--mixup", type=float, default=0.0, help="alpha (default 0: none)")
    tuning.add_argument(
        "--ema-decay", type=float, default=0.0, help="moving average of the weights, by step"
    )
    tuning.add_argument(
        "--freeze-batchnorm",
        action="store_true",
        help="train with BatchNorm's running statistics, to which a refit was fitted",
    )
    tuning.add_argument(
        "--augment",
        choices=("crop_flip", "resized_crop_flip"),
        help="of the images; resized_crop_flip is for photos in folders",
    )
    tuning.add_argument("--channels-last", action="store_true", help="memory format")
    tuning.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    tuning.add_argument(
        "--distil", action="store_true", help="learn from the unpruned model's outputs as well"
    )
    return tuning


def _add_repair_images(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--repair-images", type=int, default=10_000, help="training images for the repair"
    )
    command.add_argument(
        "--repair-memory",
        type=float,
        default=4.0,
        help="GiB for a refit; a layer has fewer images where they do not fit (default 4)",
    )


def _add_input(
    command: argparse.ArgumentParser, device: str = "cpu, cuda, cuda:1, ... (default auto)"
) -> None:
    command.add_argument(
        "--model", required=True, help="a name such as resnet56, or module:function of your own"
    )
    command.add_argument("--weights", required=True, help=".safetensors, or a PyTorch state dict")
    command.add_argument(
        "--data",
        required=True,
        help="folder with CIFAR-10, or with photos by class (train/CLASS/*.jpg beside val, or "
        "CLASS/*.jpg), an .npz, or digits",
    )
    # A word that begins with a minus is an option to argparse, unless it is a single number.
    for option, if_negative in (
        ("--mean", "; with = where the first is negative, such as --mean=-0.1,0,0"),
        ("--std", ""),
    ):
        command.add_argument(
            option,
            type=_list_of(float),
            help="of each channel, such as 0.5,0.5,0.5, for pixels of 0 to 1: what the model was "
            f"trained with, in place of the data's own{if_negative}",
        )
    command.add_argument("--batch-size", type=int, default=128)
    command.add_argument("--device", default="auto", help=device)
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _count_or_share(text: str) -> float | int:
    """An integer is a count, anything with a point a share."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share such as 0.5 or a count, got {text!r}"
        ) from None


def _share_or_time(text: str) -> float | str:
    """A number is a share, a number with the unit ms a time."""
    if text.endswith("ms"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share such as 0.5 or milliseconds such as 2.5ms, got {text!r}"
        ) from None


def _list_of(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Reads values joined by commas."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(item(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be values joined by commas, got {text!r}"
            ) from None

    return read


if __name__ == "__main__":
    sys.exit(main())
