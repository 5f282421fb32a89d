"""The command line: `pyadv train | recipes | evaluate | bench | info`.

Options that are not given stay None: the defaults of `pyadv.training.Config` then apply.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Adversarial training and robustness evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from pyadv._version import __version__

        typer.echo(f"pyadv {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def _number(text: str) -> float:
    from pyadv.training.config import number

    try:
        return number(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _option(help: str, panel: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, show_default=False, **settings)


_RUN, _DATA, _MODEL = "Run", "Data", "Network"
_ATTACK, _OPTIMISER = "Attack", "Optimisation"
_METHOD, _ADDED = "Method", "On top of any method"


@app.command()
def train(
    recipe: Annotated[
        str | None,
        _option(
            "Settings to start from: a name that `pyadv recipes` lists, or a .toml file.",
            _RUN,
            metavar="NAME",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            "standard, at, fat, trades, mart, gairat, mail-at, ...: see docs/training.md \\[at].",
            _METHOD,
            metavar="NAME",
        ),
    ] = None,
    beta: Annotated[
        float | None, _option("TRADES, MART and relatives: weight of the KL term.", _METHOD)
    ] = None,
    tau: Annotated[
        int | None, _option("FAT: fooled steps allowed \\[the official schedule].", _METHOD)
    ] = None,
    begin_epoch: Annotated[
        int | None, _option("GAIRAT, MAIL: first weighted epoch.", _METHOD)
    ] = None,
    gairat_lam: Annotated[
        float | None, _option("GAIRAT: lambda \\[-1; gair-fat: 0, gair-rst: 3].", _METHOD)
    ] = None,
    mail_margin: Annotated[
        str | None, _option("MAIL: nat, adv, dif or dif_conf \\[adv].", _METHOD, metavar="NAME")
    ] = None,
    mail_slope: Annotated[float | None, _option("MAIL: slope of the weights.", _METHOD)] = None,
    mail_bias: Annotated[float | None, _option("MAIL: their bias.", _METHOD)] = None,
    mail_normalize: Annotated[
        str | None, _option("MAIL: mean, x3 or none \\[mean].", _METHOD, metavar="NAME")
    ] = None,
    emr: Annotated[
        float | None, _option("Strength of effective margin regularisation \\[0].", _ADDED)
    ] = None,
    emr_temperature: Annotated[float | None, _option("Its temperature \\[40].", _ADDED)] = None,
    norm_penalty: Annotated[
        float | None, _option("Strength of the penalty on the layers' norms \\[0].", _ADDED)
    ] = None,
    awp: Annotated[
        float | None, _option("Size of adversarial weight perturbation \\[0].", _ADDED)
    ] = None,
    awp_begin_epoch: Annotated[int | None, _option("Its first epoch \\[1].", _ADDED)] = None,
    ema: Annotated[
        float | None, _option("Evaluate the average of the weights with this decay \\[0].", _ADDED)
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "Name, .npz, folder of idx files, CIFAR batches or images (a folder per class), "
            "torchvision:NAME, or package.module:name \\[fashion-mini].",
            _DATA,
            metavar="SOURCE",
        ),
    ] = None,
    image_size: Annotated[
        int | None, _option("Height and width that image files are resized and cut to.", _DATA)
    ] = None,
    stream: Annotated[
        bool | None,
        _option("Read image files batch by batch \\[where they do not fit memory].", _DATA),
    ] = None,
    workers: Annotated[
        int | None, _option("Processes that read images \\[one per core, at most 8].", _DATA)
    ] = None,
    transform: Annotated[
        str | None,
        _option(
            "Augmentation: resized-crop, v2:NAME of torchvision, or package.module:name.",
            _DATA,
            metavar="NAME",
        ),
    ] = None,
    augment: Annotated[
        bool | None, _option("Random crop and flip \\[for colour images].", _DATA)
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "small-cnn, resnet-18, preact-resnet-18, wrn-34-10, ...; timm:NAME; or "
            "package.module:name, a class or function of your own.",
            _MODEL,
            metavar="NAME",
        ),
    ] = None,
    model_args: Annotated[
        str | None,
        _option(
            "Keyword arguments of the network, name=value,name=value or JSON.",
            _MODEL,
            metavar="ARGS",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        _option("File of weights to start from, .pt or .safetensors.", _MODEL, metavar="FILE"),
    ] = None,
    mean: Annotated[
        Any,
        _option(
            "Mean of the pixels, e.g. 0.5 or 0.485,0.456,0.406: the network normalises by it.",
            _MODEL,
            parser=_numbers,
            metavar="NUMBERS",
        ),
    ] = None,
    std: Annotated[
        Any,
        _option("Their standard deviation.", _MODEL, parser=_numbers, metavar="NUMBERS"),
    ] = None,
    out: Annotated[Path | None, _option("Run folder \\[runs/DATA-METHOD-TIME].", _RUN)] = None,
    resume: Annotated[
        Path | None,
        _option("Continue the run in this folder, also with more --epochs.", _RUN, metavar="RUN"),
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1 \\[cuda if there].", _RUN)] = None,
    precision: Annotated[
        str | None, _option("fp32, bf16 or fp16 \\[fp32].", _RUN, metavar="NAME")
    ] = None,
    fsdp: Annotated[
        bool | None,
        _option("Shard weights, gradients and optimizer over the processes (FSDP2).", _RUN),
    ] = None,
    channels_last: Annotated[
        bool | None, _option("Images and weights in channels-last order.", _RUN)
    ] = None,
    seed: Annotated[int | None, _option("Seed \\[0].", _RUN)] = None,
    log_with: Annotated[
        str | None,
        _option(
            "Trackers, e.g. tensorboard,wandb,mlflow, or none \\[tensorboard if installed].",
            _RUN,
            metavar="NAMES",
        ),
    ] = None,
    val: Annotated[
        int | None, _option("Training images held out to choose best.pt \\[0].", _RUN)
    ] = None,
    norm: Annotated[str | None, _option("Linf, L2 or L1 \\[Linf].", _ATTACK)] = None,
    eps: Annotated[
        float | None, _option("Radius, e.g. 8/255.", _ATTACK, parser=_number, metavar="NUMBER")
    ] = None,
    alpha: Annotated[
        float | None,
        _option("Step size \\[by eps, norm and steps].", _ATTACK, parser=_number, metavar="NUMBER"),
    ] = None,
    steps: Annotated[int | None, _option("Steps \\[10].", _ATTACK)] = None,
    start: Annotated[
        str | None,
        _option("keyed, uniform, normal_small or none \\[keyed].", _ATTACK, metavar="NAME"),
    ] = None,
    attack_loss: Annotated[
        str | None,
        _option("ce, kl, margin, ... \\[the method's].", _ATTACK, metavar="NAME"),
    ] = None,
    speed: Annotated[
        str | None, _option("exact, fast or bfloat16 \\[fast].", _ATTACK, metavar="NAME")
    ] = None,
    eps_warmup: Annotated[
        int | None, _option("Epochs over which eps grows to its value.", _ATTACK)
    ] = None,
    epochs: Annotated[int | None, _option("Epochs.", _OPTIMISER)] = None,
    batch_size: Annotated[int | None, _option("Batch size \\[128].", _OPTIMISER)] = None,
    accumulate: Annotated[
        int | None, _option("Parts in which a batch goes through the network \\[1].", _OPTIMISER)
    ] = None,
    optimizer: Annotated[
        str | None, _option("sgd or adamw \\[sgd].", _OPTIMISER, metavar="NAME")
    ] = None,
    clip: Annotated[
        float | None, _option("Largest norm of the gradient; 0: no limit \\[0].", _OPTIMISER)
    ] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", _OPTIMISER)] = None,
    schedule: Annotated[
        str | None,
        _option("constant, piecewise, cosine or cyclic.", _OPTIMISER, metavar="NAME"),
    ] = None,
    weight_decay: Annotated[float | None, _option("Weight decay \\[5e-4].", _OPTIMISER)] = None,
) -> None:
    """Train a robust network, and report its accuracy on the test set.

    Without options: adversarial training (PGD-10, Linf 0.1) of a small network on the embedded
    part of Fashion-MNIST, a few minutes on two CPU cores. Defaults without a value here depend on
    the data set. Ctrl-C saves; --resume continues exactly.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with _errors_as_messages():
        _train(given)


def _train(given: dict[str, Any]) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from pyadv import training
    from pyadv.training.display import report_table

    place = {name: given.pop(name, None) for name in ("out", "resume", "device")}
    console, device = Console(), place["device"]
    display = training.Display(console)
    folder = place["resume"]
    try:
        if folder is not None:
            epochs = given.pop("epochs", None)
            if given or place["out"]:
                names = ", ".join(sorted({*given, *(["out"] if place["out"] else [])}))
                raise ValueError(f"--resume takes its settings from the run; drop {names}")
            report = training.resume(folder, epochs=epochs, device=device, display=display)
        else:
            recipe = given.pop("recipe", None)
            if recipe is None:
                config = training.Config.from_dict(given)
            else:
                config = training.recipes.load(recipe).config(**given)
            folder = place["out"] or _new_folder(config)
            report = training.train(config, folder, device=device, display=display)
    except training.Interrupted as stop:
        display.message(f"{stop}; continue with: pyadv train --resume {folder}")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:  # outside the training loop, or the second signal in it
        text = "interrupted"
        if folder is not None and (folder / "checkpoint.pt").exists():
            text += f"; continue with: pyadv train --resume {folder}"
        display.message(text)
        raise typer.Exit(130) from None
    if PartialState().is_main_process and report is not None:
        console.print(report_table(report, str(folder)))


def _new_folder(config: Any) -> Path:
    data = Path(config.data).stem
    return Path("runs") / f"{data}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.", show_default=False)] = None,
) -> None:
    """List the published settings that `pyadv train --recipe NAME` starts from."""
    with _errors_as_messages():
        from pyadv.training import recipes

        if name is not None:
            typer.echo(recipes.path(name).read_text(encoding="utf-8"), nl=False)
            return
        rows = [("NAME", "METHOD", "MODEL", "DATA", "SOURCE")]
        for recipe in map(recipes.load, recipes.names()):
            c = recipe.config()
            rows.append((recipe.name, c.method, c.model or "-", c.data, recipe.source))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            typer.echo("  ".join(cells).rstrip())


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run folder or checkpoint of `pyadv train`; a network as `pyadv train --model` "
            "takes it: timm:NAME, package.module:name, small-cnn, ...; or robustbench:NAME, a "
            "model of its zoo.",
            show_default=False,
        ),
    ],
    suite: Annotated[
        str,
        typer.Option(
            help="pgd20, pgdplus, autoattack, masking (does it mask its gradients?), margins (how "
            "far is the decision boundary?), or all.",
            metavar="NAME",
        ),
    ] = "pgd20",
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set, as for `pyadv train` \\[the run's].",
            metavar="SOURCE",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width that image files are resized and cut to \\[the run's].",
            show_default=False,
        ),
    ] = None,
    model_args: Annotated[
        str | None,
        typer.Option(
            help="Keyword arguments of a network by name, name=value,name=value or JSON.",
            metavar="ARGS",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="File of its weights, .pt or .safetensors.", metavar="FILE", show_default=False
        ),
    ] = None,
    mean: Annotated[
        Any,
        typer.Option(
            help="Mean of the pixels, e.g. 0.485,0.456,0.406: the network normalises by it.",
            parser=_numbers,
            metavar="NUMBERS",
            show_default=False,
        ),
    ] = None,
    std: Annotated[
        Any,
        typer.Option(
            help="Their standard deviation.",
            parser=_numbers,
            metavar="NUMBERS",
            show_default=False,
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            help="Radius \\[the run's].", parser=_number, metavar="NUMBER", show_default=False
        ),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="Linf, L2 or L1 \\[the run's; else Linf].", show_default=False),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", help="First n test images \\[all].", show_default=False)
    ] = None,
    bs: Annotated[int, typer.Option("--bs", help="Rows that go through the model at once.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the random starts.")] = 0,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="Another model for the same task, whose adversarial examples the masking checks "
            "try: as MODEL, without --weights and the like.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda \\[cuda if there].", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the report \\[evaluation/MODEL-SUITE, beside the checkpoint].",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Give every part of the suite `all` all images; without it the slow parts get the "
            "first 100 or 500.",
        ),
    ] = False,
) -> None:
    """Measure how robust a network is, and write a report with pictures.

    Ctrl-C keeps what was found: the same command continues from there. Under torchrun or
    accelerate launch the processes divide the images among themselves.
    """
    given = dict(locals())
    settings = {name: given.pop(name) for name in ("model_args", "weights", "mean", "std")}
    network = {name: value for name, value in settings.items() if value is not None}
    with _errors_as_messages(), _launched(given.pop("device")) as place:
        _evaluate(place, network=network, **given)


@contextlib.contextmanager
def _launched(device: str | None) -> Iterator[Any]:
    """Yield the device of this process; join the processes that torchrun or accelerate started."""
    import torch
    import torch.distributed as dist

    from pyadv.training import build

    place = build.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield place
        return
    if place.type == "cuda":
        if place.index is None:
            local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group("gloo")  # tables alone travel between the processes
    try:
        yield place
    finally:
        dist.destroy_process_group()


def _evaluate(
    place: Any,
    target: str,
    suite: str,
    data: str | None,
    image_size: int | None,
    network: dict[str, Any],
    eps: float | None,
    norm: str | None,
    n: int | None,
    bs: int,
    seed: int,
    surrogate: str | None,
    out: Path | None,
    full: bool,
) -> None:
    from rich.console import Console

    from pyadv import training
    from pyadv.attacks.processes import together
    from pyadv.attacks.progress import to_stderr
    from pyadv.engine import checks
    from pyadv.evaluation import document as documents
    from pyadv.training.lock import RunLock

    if n is not None and n < 1:
        raise ValueError(f"--n must be >= 1, got {n}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size must be >= 1, got {image_size}")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    checks.choice("suite", suite, tuple(documents.SUITE_PARTS))
    subject = _subject(target, data, image_size, network, eps, norm)
    images = subject.images
    settings = {"model": target, "suite": suite, "data": data or images.name, "eps": subject.eps}
    settings |= {"norm": subject.norm, "seed": seed, "surrogate": surrogate, "full": full}
    if image_size is not None:
        settings["image_size"] = image_size
    settings |= {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}
    x, y = images.read("test", slice(n))
    model = subject.model.to(place)
    other = None
    if surrogate is not None:
        their = _find_run(surrogate)
        other = (_network(surrogate, images, {}) if their is None else their.model).to(place)
    work = {"eps": subject.eps, "norm": subject.norm, "batch_size": bs}
    named = {
        "seed": seed,
        "surrogate": other,
        "title": f"{target} on {images.name}",
        "command": shlex.join(["pyadv", *sys.argv[1:]]),
        "budget": documents.BUDGET if suite == "all" and not full else None,
    }
    if not subject.is_run:
        named["state_name"] = shlex.join([target, *filter(None, [network.get("model_args")])])
    try:
        with together(model, None, () if other is None else (other,)) as processes:
            main = processes.rank == 0
            display = training.Display(Console(), quiet=not main)
            named_folder = _folder(out, subject, target, settings) if main else Path()
            folder = processes.first(named_folder)
            try:
                with RunLock(folder, active=main):
                    document = _measure(suite, model, x, y, work, named, folder, processes, display)
                    if main:
                        _write(document, folder, display, model, x, y, images.classes)
            finally:
                if main:
                    documents.release(folder)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            to_stderr("pyadv: interrupted; the same command continues from here")
        raise typer.Exit(130) from None


@dataclass
class _Subject:
    """What is evaluated.

    Attributes:
        model: the network, in eval mode.
        images: the data set.
        norm, eps: the ball.
        parent: the folder in which the folders of reports are.
        is_run: whether `pyadv train` made the network.
    """

    model: Any
    images: Any
    norm: str
    eps: float
    parent: Path
    is_run: bool


def _subject(
    target: str,
    data: str | None,
    image_size: int | None,
    network: dict[str, Any],
    eps: float | None,
    norm: str | None,
) -> _Subject:
    """Return what the command line names: a run with its data and ball, or a network by name."""
    from pyadv.data import load
    from pyadv.engine.checks import canonical_norm
    from pyadv.training import build

    norm = None if norm is None else canonical_norm(norm)
    run = _find_run(target)
    if network and (run is not None or target.startswith("robustbench:")):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in network)
        raise ValueError(f"{options}: for a network by name, but {target} has its own")
    if run is None:
        if data is None or eps is None:
            given = (("--data", data), ("--eps", eps))
            absent = [name for name, value in given if value is None]
            raise ValueError(
                f"{target} does not come with data and a radius: give {', '.join(absent)}"
            )
        images = load(data, image_size=image_size)
        model = _network(target, images, network)
        return _Subject(model, images, norm or "Linf", eps, Path(), is_run=False)
    config, parent = run.config, Path(target)
    if norm is not None and norm != config.norm and eps is None:
        raise ValueError(
            f"--norm {norm} needs --eps: the run's {config.eps:.4g} is for {config.norm}"
        )
    if data:
        images = load(data, image_size=image_size or config.image_size)
    elif image_size is not None:
        raise ValueError("--image-size needs --data: the run's images have their own size")
    else:
        images = build.data(config)
    run.check(images)
    eps = config.eps if eps is None else eps
    parent = parent if parent.is_dir() else parent.parent
    return _Subject(run.model, images, norm or config.norm, eps, parent, is_run=True)


def _measure(
    suite: str,
    model: Any,
    x: Any,
    y: Any,
    work: dict[str, Any],
    named: dict[str, Any],
    folder: Path,
    processes: Any,
    display: Any,
) -> Any:
    """Run the suite and show what it does. `work` decides its time; `named` holds the other
    settings of `run_suite`."""
    from pyadv import evaluation
    from pyadv.attacks.progress import to_stderr
    from pyadv.evaluation import document as documents

    main, expected = processes.rank == 0, None
    if main:
        counts = documents.shares(suite, len(x), named["budget"])
        seconds = evaluation.estimate(model, x, y, counts, processes=processes.count, **work)
        expected = sum(seconds.values())
        to_stderr(_expectation(seconds, counts, len(x)))
    with _shown(display, suite, len(y), expected, main) as progress:
        return evaluation.run_suite(
            suite,
            model,
            x,
            y,
            state=folder,
            progress=progress,
            group=processes,
            **work,
            **named,
        )


def _folder(out: Path | None, subject: _Subject, target: str, settings: dict[str, Any]) -> Path:
    """Return the folder of the report: `out`, which must be free, or one named after the model and
    the suite."""
    from pyadv.evaluation import document as documents

    if out is not None:
        if not documents.claim(out, settings):
            raise ValueError(
                "--out must be a new folder, or that of the same evaluation after an interruption, "
                f"but {out} holds other files"
            )
        return out
    if not subject.is_run:
        name = target.removeprefix("robustbench:").replace(":", ".")
    else:
        path = Path(target).resolve()
        name = path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
    suite = settings["suite"]
    return documents.report_folder(subject.parent / "evaluation", f"{name}-{suite}", settings)


def _expectation(seconds: dict[str, float], counts: dict[str, int], n: int) -> str:
    """Return the line that says how long the suite will take and what it leaves out."""
    from pyadv.attacks.progress import duration

    parts = ", ".join(f"{part} {duration(s)}" for part, s in seconds.items())
    text = f"expected time: about {duration(sum(seconds.values()))} ({parts})"
    few = [f"{part} {k:,}" for part, k in counts.items() if k < n and part != "curves"]
    if few:
        text += f"; of {n:,} images the default budget gives {', '.join(few)} (--full: all)"
    return text


@contextlib.contextmanager
def _shown(display: Any, suite: str, n: int, expected: float | None, main: bool) -> Iterator[Any]:
    """Yield what to call with the progress: a bar on a terminal, lines on stderr elsewhere."""
    from pyadv.attacks.progress import Watch

    if not main:
        yield None
    elif not display.console.is_terminal:
        with Watch(expected) as watch:
            yield watch
    else:
        with display.progress() as bar:
            task = bar.add_task(suite, total=None, text="")

            def show(name: str, done: int, total: int, standing: int) -> None:
                text = f"{name}: {standing} of {n} not broken"
                bar.update(task, completed=done, total=total, text=text)

            yield show


def _write(
    document: Any, folder: Path, display: Any, model: Any, x: Any, y: Any, classes: Any
) -> None:
    """Write the report, and print it. The files come first, so that no trouble with the terminal
    loses results, and the states are removed last."""
    from pyadv.training.display import report_table

    missing = document.write(folder, model, x, y, classes)
    for name, report in document.reports.items():
        display.console.print(report_table(report, f"{document.title}: {name}"))
        for remark in report.remarks:
            display.message(remark)
    for part in (document.masking, document.margins):
        if part is not None:
            display.message(str(part))
    if document.left_out:
        display.message("The default budget (--full for all): " + " ".join(document.left_out))
    for line in (*missing, f"written to {folder}"):
        display.message(line)
    _finish_stdout()
    document.remove_states()


def _find_run(target: str) -> Any:
    """Return the trained network of the run that `target` is, None if it is the name of a network.

    What exists as a file or folder is a run.
    """
    from pyadv import models, training
    from pyadv._names import did_you_mean

    if not Path(target).exists():
        if ":" in target or target in models.MODELS:
            return None
        if hint := did_you_mean(target, models.MODELS):
            raise FileNotFoundError(f"no checkpoint at {target}{hint}")
    try:
        return training.load_model(target)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        # The file was read, but its weights, settings or architecture do not fit together.
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{target} is no complete checkpoint of a run: {why}") from None


def _network(name: str, images: Any, settings: dict[str, Any]) -> Any:
    """Build the network called `name` for these images, in eval mode.

    `settings` are those of the network that `pyadv.training.Config` has.
    """
    from pyadv.training import Config, build

    if name.startswith("robustbench:"):
        from pyadv.integrations import robustbench

        return robustbench.load_model(name.partition(":")[2])
    return build.trained_network(Config.from_dict({"model": name, **settings}), images)


def _finish_stdout() -> None:
    """Flush stdout. If its reader has gone, point it to nowhere: Python would flush it again at
    exit and end with an error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # AttributeError: there is no stdout
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


@app.command()
def bench(
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            help="ops, attacks, fast, training, evaluation, startup, scaling, anatomy \\[all].",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny cases: does all run?")] = False,
    against: Annotated[
        str,
        typer.Option(
            help='"peers", the other libraries that are installed; "none"; or names with commas.',
            metavar="NAMES",
        ),
    ] = "peers",
    out: Annotated[
        Path | None,
        typer.Option(help="Results folder \\[pyadv-bench/DEVICE-DATE].", show_default=False),
    ] = None,
) -> None:
    """Measure pyadv on this machine against plain PyTorch, and other libraries if installed."""
    package = Path(__file__).parent
    folders = package / "_benchmarks", package.parent / "benchmarks"
    script = next(f / "run.py" for f in folders if f.is_dir())
    command = [sys.executable, str(script), *(questions or ()), "--against", against]
    command += ["--quick"] if quick else []
    command += ["--out", str(out)] if out else []
    raise typer.Exit(subprocess.call(command))


@app.command()
def info() -> None:
    """Print which kernels run and why, with versions, compilers and paths for a bug report."""
    from pyadv import _native

    typer.echo(_native.report())


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turn errors that a user can mend into one line on stderr and exit code 1.

    Others are bugs and keep their traceback.
    """
    from pyadv.attacks.processes import ProcessFailed
    from pyadv.attacks.progress import to_stderr

    try:
        yield
    except (ValueError, OSError, ImportError, ArithmeticError, ProcessFailed) as error:
        extra = "; pip install 'pyadv[train]'" if isinstance(error, ModuleNotFoundError) else ""
        to_stderr(f"pyadv: {error}{extra}")
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app(prog_name="pyadv" if "pyadv" in Path(sys.argv[0]).name else "python -m pyadv")
