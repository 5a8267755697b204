"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgeexport import cli_options, supervise
from edgeexport.console import Console

app = typer.Typer(
    name="edgeexport",
    help="An edge deployment compiler: a language model's checkpoint in, a proven and runnable bundle out.",
    epilog="Exit codes: 0 ok, 1 a bug in edgeexport, 2 usage or target, 3 checkpoint, 4 export, 5 lowering, 6 parity, "
    "7 missing tool or host, 8 bundle, 9 nothing wrong and not run (verify, parity).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

debug = typer.Typer(help="Find out what is wrong with a graph.", rich_markup_mode=None)
app.add_typer(debug, name="debug")

Level = Literal["L1", "L2", "L3", "L4", "L5"]


# Options that every command has. Their callbacks set up the console, before any other option is judged.
Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=cli_options.set_json, is_eager=True, help="Print one JSON document and nothing else."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=cli_options.set_quiet, is_eager=True, help="No narration, only results."),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, callback=cli_options.set_verbose, is_eager=True, show_default=False,
        help="Log more; twice for debug records and tracebacks.",
    ),
]  # fmt: skip

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file, or a known name such as smollm2-135m.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")]
Targets = Annotated[list[str], typer.Option("--target", "-t", help="A target's name or .toml file; may be repeated.")]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME|auto|PLAN",
        help="Quantisation scheme, the target's own by default; auto to choose each matrix's format within --max-size, "
        "--max-kl or --for-device; or a bundle's quant-plan.json, to choose the same.",
    ),
]
MaxSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="With --quant auto: the largest artifacts, like 4.6G.")
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        min=0, help="With --quant auto: nats from the original at most; the ladder's gate on its answers, too."
    ),
]
ForDevice = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="With --quant auto: as large as this device of the target has room."),
]
Context = Annotated[int | None, typer.Option(min=1, help="Slots of the KV cache; the target's own by default.")]
ParityLevel = Annotated[Level, typer.Option("--parity", help="How far to climb the parity ladder.")]
MaxRss = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Refuse a build whose estimated memory is above this, like 1.5G.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs: cuda is an NVIDIA GPU.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")]


InProcess = Annotated[
    bool,
    typer.Option("--in-process", help="Run the artifact in this very process, for bundles that you trust."),
]


def _apart(context: typer.Context, bundle: Path, in_process: bool) -> None:
    """Go on in a child process. Raises: BundleError `artifact-crashed`; typer.Exit with the child's exit code."""
    if in_process or not context.obj.supervised:
        return
    try:
        code = supervise.in_child()
    except supervise.Died as died:
        from edgeexport import errors

        raise errors.artifact_crashed(bundle, died.signal) from died
    if code is not None:
        raise typer.Exit(code)


def _show_version(context: typer.Context, value: bool) -> None:
    if value:
        from edgeexport import __version__

        context.obj.result(f"edgeexport {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `edgeexport` itself."""


@app.command()
def build(
    context: typer.Context,
    model: Model,
    target: Targets,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=cli_options.out_folder, help="The bundle is OUT/<model>-<target>/.")
    ] = Path("dist"),
    quant: Quant = None,
    max_size: MaxSize = None,
    max_kl: MaxKl = None,
    for_device: ForDevice = None,
    context_length: Annotated[
        int | None, typer.Option("--context", min=1, help="Slots of the KV cache; the target's own by default.")
    ] = None,
    parity: ParityLevel = "L5",
    max_rss: MaxRss = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", file_okay=False, help="Pictures and sounds to calibrate by, for schemes that do so."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Text (.txt, .md) or conversations (.jsonl) like those to come, or a folder of both, by which 4-bit "
            "weights are chosen; the package's own by default.",
        ),
    ] = None,
    calibrate_method: Annotated[
        str | None,
        typer.Option(
            "--calibrate-method",
            metavar="none|search|gptq",
            help="How 4-bit weights are chosen; by default gptq up to 2B parameters, search above.",
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where a calibration computes: cuda is an NVIDIA GPU.")
    ] = "cpu",
    dump: Annotated[
        Path | None, typer.Option(callback=cli_options.out_folder, help="Write the graph of every step to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is something else.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Build a bundle and prove it against PyTorch."""
    from edgeexport import cli_show, pipeline

    console: Console = context.obj
    limit, size = cli_options.size("--max-rss", max_rss), cli_options.size("--max-size", max_size)

    def one(name: str) -> pipeline.BuildResult:
        return pipeline.build(
            model, name, out, quant=quant, max_size=size, max_kl=max_kl, for_device=for_device,
            context=context_length, parity=parity, max_rss=limit, samples=samples,
            calibrate=calibrate, calibrate_method=calibrate_method, device=device,
            dump=dump, force=force, console=console,
        )  # fmt: skip

    cli_show.builds(console, target, one)


@app.command()
def plan(
    context: typer.Context,
    model: Model,
    target: Targets,
    quant: Quant = None,
    max_size: MaxSize = None,
    max_kl: MaxKl = None,
    for_device: ForDevice = None,
    context_length: Annotated[
        int | None, typer.Option("--context", min=1, help="Slots of the KV cache; the target's own by default.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Say what a build would make and need.

    Reads headers only: sizes, build memory and time, refused ops, devices that fit, the roofline in tokens per second.
    """
    from edgeexport import cli_show
    from edgeexport import plan as plans

    asked = plans.Asked(quant, cli_options.size("--max-size", max_size), max_kl, for_device)
    cli_show.plans(context.obj, target, lambda name: plans.plan(model, name, asked, context_length))


@app.command()
def export(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=cli_options.out_folder, help="The folder to write to.")
    ] = Path("dist"),
    context_length: Annotated[
        int | None, typer.Option("--context", min=1, help="Slots of the KV cache; the model's own by default.")
    ] = None,
    reference_weights: Annotated[
        bool, typer.Option("--reference-weights", help="Point into the checkpoint's safetensors and copy nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the canonical ONNX graph."""
    from edgeexport import cli_show, pipeline

    console: Console = context.obj
    cli_show.export(
        console,
        pipeline.export(model, out, context=context_length, reference_weights=reference_weights, console=console),
    )


@app.command()
def parity(
    context: typer.Context,
    bundle: BundlePath,
    model: Annotated[
        str | None, typer.Argument(help="The checkpoint that the bundle was built from; not needed with --import.")
    ] = None,
    level: Annotated[Level, typer.Option(help="How far to climb the parity ladder.")] = "L5",
    max_rss: MaxRss = None,
    imported: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", metavar="REPORT", dir_okay=False, help="A report that a device made of BUNDLE; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            callback=cli_options.out_folder,
            help="With --import: the folder to write to; BUNDLE.parity by default.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            dir_okay=False,
            help="Compare along this text instead: KL, share of equal best tokens, perplexity of both.",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="With --device cuda: what PyTorch computes in; float16 by default."),
    ] = None,
    in_process: InProcess = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Climb the parity ladder again, or add what devices measured.

    Compares BUNDLE with the MODEL it was built from. With --import, writes parity.json and parity.html with the rows
    of BUNDLE and those of the devices to another folder: BUNDLE stays as it is. With --device cuda, says how far the
    MODEL on a GPU, and BUNDLE's engine, are from the MODEL in float32.
    """
    _apart(context, bundle, in_process)
    from edgeexport import cli_import, cli_show, errors, pipeline

    console: Console = context.obj
    if device == "cpu" and dtype is not None:
        raise errors.bad_command_line("edgeexport parity", "--dtype belongs to --device cuda")
    if text is not None and (imported or device == "cuda"):
        raise errors.bad_command_line("edgeexport parity", "--text excludes --import and --device cuda")
    if device == "cuda" and imported:
        raise errors.bad_command_line("edgeexport parity", "--device and --import exclude each other")
    if imported:
        if model is not None:
            raise errors.bad_command_line("edgeexport parity", "MODEL and --import exclude each other")
        folder = out or bundle.with_name(f"{bundle.name}.parity")
        cli_show.parity(console, folder, cli_import.merge(bundle, imported, folder))
        return
    if model is None:
        raise errors.bad_command_line("edgeexport parity", "Missing argument 'MODEL'.")
    if out is not None:
        raise errors.bad_command_line("edgeexport parity", "--out belongs to --import")
    if device == "cuda":
        from edgeexport import cli_gpu

        cli_show.inspect(console, cli_gpu.parity(bundle, model, dtype or "float16"))
        return
    if text is not None:
        cli_show.parity_text(console, bundle, text, pipeline.parity_text(bundle, model, text, console=console))
        return
    limit = cli_options.size("--max-rss", max_rss)
    cli_show.parity(console, bundle, pipeline.parity(bundle, model, level=level, max_rss=limit, console=console))


@app.command()
def verify(
    context: typer.Context,
    bundle: BundlePath,
    golden: Annotated[bool, typer.Option(help="Replay the golden vectors as well as checking every hash.")] = True,
    threads: Threads = None,
    in_process: InProcess = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Check a bundle without PyTorch.

    Every byte against its hash, and what it computes against its golden vectors.
    """
    _apart(context, bundle, in_process)
    from edgeexport import cli_show

    cli_show.verify(context.obj, bundle, golden=golden, threads=threads)


@app.command()
def inspect(
    context: typer.Context, bundle: BundlePath, json: Json = False, quiet: Quiet = False, verbose: Verbose = 0
) -> None:
    """Show what is in a bundle, or in any .mlpackage, .onnx or .engine."""
    from edgeexport import cli_show

    if bundle.suffix == ".mlpackage":
        from edgeexport.backends import coreml_inspect

        cli_show.inspect(context.obj, coreml_inspect.describe(bundle))
        return
    if bundle.suffix in {".onnx", ".engine"}:
        from edgeexport.backends import tensorrt_inspect

        looks = {".onnx": tensorrt_inspect.describe_onnx, ".engine": tensorrt_inspect.describe_engine}
        cli_show.inspect(context.obj, looks[bundle.suffix](bundle))
        return
    from edgeexport.bundle import open_bundle
    from edgeexport.bundle.inspect import describe

    cli_show.inspect(context.obj, describe(open_bundle(bundle)))


@debug.command()
def reduce(
    context: typer.Context,
    graph: Annotated[Path, typer.Argument(metavar="MODEL", help="Any .onnx.")],
    out: Annotated[Path, typer.Option("--out", "-o", callback=cli_options.out_file, help="The .onnx to write.")] = Path(
        "reduced.onnx"
    ),
    check: Annotated[
        str, typer.Option(metavar="COMMAND", help="Fails for a bad graph, whose path {} stands for.")
    ] = "",
    shape: Annotated[
        list[str] | None, typer.Option(help="An input's size, such as input_ids:[1,4]; may be repeated.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Find the smallest part of an ONNX graph that fails, by Polygraphy.

    Without --check: the part that ONNX Runtime and TensorRT compute differently, which takes an NVIDIA GPU.
    """
    from edgeexport import cli_show
    from edgeexport.backends import tensorrt_inspect

    console: Console = context.obj
    with console.step(f"Reducing {graph}"):
        found = tensorrt_inspect.reduce(graph, out, check, shape or ())
    cli_show.inspect(console, found)


@app.command()
def eval(
    context: typer.Context,
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Any .mlpackage.")],
    inputs: Annotated[
        Path, typer.Option("--inputs", dir_okay=False, help="Arrays by the names of the inputs, as .npz.")
    ],
    function: Annotated[str, typer.Option(help="One of its functions; its default by default.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", callback=cli_options.out_file, help="Write the outputs here, as .npz.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run a function of an .mlpackage once, by the interpreter: no Mac is needed, and no Core ML is proven."""
    from edgeexport import cli_show
    from edgeexport.backends import coreml_inspect

    cli_show.inspect(context.obj, coreml_inspect.evaluate(package, inputs, function, out))


@app.command()
def run(
    context: typer.Context,
    bundle: BundlePath,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", callback=cli_options.text, help="Answer this once instead of a chat."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(callback=cli_options.text, help="The system message of the chat template.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", dir_okay=False, help="A picture for the prompt; several in order."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", "-a", dir_okay=False, help="A wav file for the prompt; several in order."),
    ] = None,
    action: Annotated[
        bool, typer.Option("--action", help="Print the answer as a phone agent's action: JSON, with pixels.")
    ] = False,
    draw: Annotated[
        Path | None, typer.Option(dir_okay=False, help="With --action: the picture with the action drawn on it.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer: 512, or 3000 with --action.")] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Taken off a token's logit for each time it was said: 0, or 0.2 with --action.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling, where the temperature is above 0.")] = 0,
    threads: Threads = None,
    in_process: InProcess = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Chat with a bundle, or answer one --prompt.

    Ctrl-C ends an answer, Ctrl-D the chat.
    """
    _apart(context, bundle, in_process)
    from edgeexport import cli_chat

    cli_chat.run(
        context.obj,
        bundle,
        prompt,
        cli_chat.Settings(
            system,
            raw,
            max_tokens or (3000 if action else 512),
            temperature,
            seed,
            threads,
            frequency_penalty if frequency_penalty is not None else (0.2 if action else 0.0),
        ),
        cli_chat.Shown(tuple(image or ()), tuple(audio or ()), action, draw),
    )


@app.command()
def bench(
    context: typer.Context,
    bundle: BundlePath,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 64,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 128,
    threads: Threads = None,
    device: Device = "cpu",
    in_process: InProcess = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure a bundle on this machine.

    Prefill and decode speed, time to the first token, memory, share of the memory-bandwidth roofline.
    """
    _apart(context, bundle, in_process)
    from edgeexport import bench as benches
    from edgeexport import cli_show

    console: Console = context.obj
    if device == "cuda":
        from edgeexport import cli_gpu

        cli_show.bench(console, cli_gpu.bench(bundle, prompt_tokens, decode_tokens))
        return
    cli_show.bench(
        console,
        benches.bench(
            bundle, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, threads=threads, console=console
        ),
    )


@app.command()
def targets(context: typer.Context, json: Json = False, quiet: Quiet = False, verbose: Verbose = 0) -> None:
    """List the targets."""
    from edgeexport import cli_show

    cli_show.targets(context.obj)


@app.command()
def ops(
    context: typer.Context,
    backend: Annotated[str | None, typer.Option(help="One backend's table; all of them by default.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """List what backends do with each op."""
    from edgeexport import cli_show

    cli_show.ops(context.obj, backend)


@app.command()
def doctor(context: typer.Context, json: Json = False, quiet: Quiet = False, verbose: Verbose = 0) -> None:
    """Say what this machine has."""
    from edgeexport import cli_show
    from edgeexport import doctor as doctors

    cli_show.doctor(context.obj, doctors.report())
