"""Plan a run on Ascend without an NPU: memory, launches and bytes sent, from MindSpore's own Ascend backend.

    python tools/plan.py --model sigma-mini --part train --height 256 --width 256 --batch 8 --cards 8 --zero 1
    python tools/plan.py --recipe configs/train/512-MS.yaml --largest --gib 32 64

The graph is compiled, its kernels are selected and its memory is planned by MindSpore's real allocator (a dry run on
the Ascend host, which needs g++). Nothing is computed or measured. Exit code 1 if it does not fit the card.
"""

from mindsigma import command_line  # first, as it judges this Python

# isort: split
import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

from mindsigma.choices import DMD_REGRESSIONS, ZERO_STAGES
from mindsigma.errors import MindSigmaError
from mindsigma.inspect.recipe import of_recipe
from mindsigma.sampling import SAMPLERS
from mindsigma.training.methods import DISTILLATIONS

KINDS = 6  # of launches that are listed


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0],
        "python tools/plan.py --model sigma-mini --part train --batch 8",
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    recipe = "the training step of a config of tools/train.py or distill.py; these options win over it"
    add("--recipe", metavar="FILE", help=recipe)
    add("--model", help="preset or released name (no weights needed), folder or weight file; default sigma-mini")
    add("--part", help="step (default), caption, vae-decode, vae-encode, t5 or train")
    add("--height", type=int, help="pixels; default the model's base resolution")
    add("--width", type=int, help="pixels; default the model's base resolution")
    add("--batch", type=int, help="images a card; default 1")
    add("--tokens", type=int, help="length of the captions; default the model's longest")
    add("--dtype", choices=("fp16", "bf16", "fp32"), help="of the activations; default fp16, and bf16 of train")
    add("--depth", type=int, help="only so many blocks; their weights have no values then")
    add("--kv-compression", metavar="MODE:FACTOR:LAYERS", help="instead of the model's own; none for none")
    add("--sampler", choices=tuple(SAMPLERS), default="dpm", help="of the denoising step")
    add("--pag-layers", metavar="LAYERS", help="the step has perturbed attention in these blocks, as in 14 or 3,13-15")
    add("--inpaint", action="store_true", help="the step sets to a given image what a mask keeps")
    add("--control-layers", type=int, metavar="N", help="the step has a ControlNet of N blocks beside it")
    add("--method", choices=DISTILLATIONS, help="the training step distils")
    add("--dmd-regression", choices=DMD_REGRESSIONS, help="of --method dmd; default huber")
    add("--lora-rank", type=int, metavar="N", help="it trains a LoRA of this rank")
    add("--dora", action="store_true", default=None, help="it trains magnitudes, too")
    add("--optimizer", choices=("came", "adamw", "lion"), help="of the training step; default came")
    add("--recompute", action=switch, help="it computes the blocks' activations twice")
    add("--ema", action=switch, help="it keeps a moving average of the weights")
    add("--fp32-attention", action=switch, help="its self-attention is in fp32")
    add("--cards", type=int, default=1, help="that train together")
    add("--zero", type=int, default=0, choices=ZERO_STAGES, help="stage of ZeRO over the cards")
    add("--zero-group", type=int, default=0, metavar="N", help="cards that divide among themselves; default all")
    add("--gib", type=float, nargs="+", default=[64.0], help="memory of a card; of several with --largest")
    add("--largest", action="store_true", help="find the largest batch that fits --gib; its plans begin at --batch")
    add("--few-blocks", action="store_true", help="tell --largest by plans of 2 and 4 blocks alone, which is faster")
    add("--lines", action="store_true", help="also tell which line of the source makes each launch")
    add("--json", metavar="FILE", help="write the plan as JSON")
    return parser


def text_of(plan):
    """The lines that tell a Plan."""
    total, fragments = plan.total, plan.fragments_mb / max(plan.peak_mb, 1) - 1
    rest = max(plan.peak_mb - plan.weight_mb - plan.state_mb, 0.0)
    lines = [
        f"memory     {plan.peak_mb} MiB at the peak, {plan.fragments_mb} MiB with fragments ({fragments:.0%} more)",
        f"of it      weights {plan.weight_mb:.0f}, states {plan.state_mb:.0f}, all else {rest:.0f} MiB",
        f"launches   {total['fast']} fast, {total['legacy']} legacy, {total['other']} others; "
        f"{total['view']} views, which launch nothing",
    ]
    for name in ("fast", "legacy", "other"):
        kinds = list(plan.launches[name].items())
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds[: KINDS if name == "fast" else None])
        if listed:
            lines.append(f"  {name:9}{listed}{', ...' if name == 'fast' and len(kinds) > KINDS else ''}")
    first, second = plan.compile_seconds, plan.dispatch_seconds
    lines.append(f"this host  {first:.1f} s for the first call (compilation), {second:.2f} s for the second (dispatch)")
    if plan.collectives:
        lines.append(
            f"beside     {plan.early} of {plan.collectives} collectives are launched before the backward pass ends"
            + (f"; by tenths of it {' '.join(map(str, plan.tenths))}" if plan.early else "")
            + f"; it waits {plan.waits} times for one"
        )
    if plan.sent_mb:
        lines.append(f"sent       {plan.sent_mb:.0f} MiB a step leave a card for collectives, in rings")
    for line, kinds in plan.lines.items():
        lines.append(f"  {line:40}{', '.join(f'{kind} {count}' for kind, count in kinds.items())}")
    return "\n".join(lines)


def main():
    """Plan and print; returns the exit code."""
    args = build_parser().parse_args()
    if args.cards < 1 or not all(0 < gib <= 1024 for gib in args.gib):
        raise MindSigmaError("--cards must be at least 1, --gib more than 0 and at most 1024")
    values = {name: value for name, value in vars(args).items() if value is not None}
    if args.recipe:
        if args.part not in (None, "train"):
            raise MindSigmaError(f"--recipe {args.recipe}: it is of --part train, not {args.part}")
        values = {**of_recipe(args.recipe), **values}
    if len(args.gib) > 1 and not args.largest:
        raise MindSigmaError("--gib: several sizes are of --largest")
    if args.lines and args.largest:
        raise MindSigmaError("--lines is of one plan, not of --largest")
    if (args.cards > 1 or args.zero) and values.get("part") != "train":
        raise MindSigmaError("--cards and --zero are of --part train")
    if (args.method or args.lora_rank or args.dora) and values.get("part") != "train":
        raise MindSigmaError("--method, --lora-rank and --dora are of --part train")
    if args.few_blocks and not args.largest:
        raise MindSigmaError("--few-blocks is of --largest")
    from mindsigma.inspect.launches import FEW, TooLarge, batches_by_few_blocks, fits, largest_batches, plan
    from mindsigma.inspect.parts import Request

    values = {"model": "sigma-mini", "dtype": "bf16" if values.get("part") == "train" else "fp16", **values}
    values["weights"] = "depth" not in values
    request = Request(**{field.name: values[field.name] for field in fields(Request) if field.name in values})
    print("Planned by MindSpore's Ascend backend in a dry run, not measured on an NPU.", flush=True)
    if args.recipe:
        print(f"recipe     {request.model}, {request.height} px, {request.dtype}", flush=True)
    if args.few_blocks:
        (base, each), batches = batches_by_few_blocks(request, args.gib, args.cards, args.zero, args.zero_group)
        print(f"memory     {base:.0f} MiB and {each:.1f} MiB an image, by plans of {FEW[0]} and {FEW[1]} blocks")
        for gib, batch in zip(args.gib, batches):
            print(f"largest    batch {batch} in {gib:g} GiB by this line, which no plan of all blocks has checked")
        if args.json:
            found = {"base_mb": base, "image_mb": each, "batches": dict(zip(args.gib, batches))}
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0 if all(batches) else 1
    if args.largest:
        found = largest_batches(request, args.gib, args.cards, args.zero, args.zero_group)
    else:
        try:
            planned = plan(request, args.cards, args.zero, args.lines, args.zero_group)
            found = [(request.batch, planned, None)]
        except TooLarge as error:
            print(f"memory     {error}")
            found = [(request.batch, None, None)]
    for gib, (batch, planned, refused) in zip(args.gib, found):
        if planned is None:
            if args.largest:
                print(f"largest    not even a batch of 1 fits {gib:g} GiB")
            continue
        if args.largest:
            beyond = "more may fit" if refused is None else f"{refused} does not fit"
            print(f"largest    batch {batch} in {gib:g} GiB; {beyond}")
        print(text_of(planned), flush=True)
    fitting = all(fits(planned, gib) for gib, (_, planned, _) in zip(args.gib, found))
    if not args.largest:
        print(f"fits       {'' if fitting else 'not '}into {args.gib[0]:g} GiB")
    if args.json:
        plans = [
            {"gib": gib, "batch": batch, "refused": refused, **(asdict(planned) if planned else {})}
            for gib, (batch, planned, refused) in zip(args.gib, found)
        ]
        text = json.dumps(plans if args.largest else plans[0], indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0 if fitting else 1


if __name__ == "__main__":
    command_line.run(main)
