"""What each verb of the command does that is no stage of an experiment; its options come from `launch.cli`.

What a verb needs is imported when it runs, so that the command itself starts at once.
"""

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError
from configs.schema import Experiment
from launch import stages

NOT_A_DEVICE = "Research software, not a medical device: no diagnosis may rest on it."


def launch(options: argparse.Namespace) -> None:
    """Start a stage on the ranks of this host, or hand it to SLURM."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a host that ends before another is no news
    asked = replace(
        stages.Call.of(options.config, options.overrides).job(options.stage),
        gpus=options.gpus,
        nodes=options.nodes,
        rendezvous=options.rendezvous,
        restarts=options.max_restarts,
    )
    if options.sbatch and not options.slurm:
        raise UserError(f"--sbatch={options.sbatch[0]}: is for a job of SLURM; add --slurm, or leave it out")
    if options.slurm:
        asked.sbatch(options.sbatch, dry=options.dry_run)
    else:
        asked.run(show=True, dry=options.dry_run)


def verify(options: argparse.Namespace) -> None:
    """Prove that a set is whole and does not leak."""
    from shards.verify import verify

    print("\n".join(verify(options.folder, quick=options.quick)))


def predict(options: argparse.Namespace) -> None:
    """Classify images; status 1 if one has no verdict."""
    from eval.inputs import listing
    from eval.predict import Predictor
    from eval.predictions import check_output, format_of, write

    check_output(options.output)
    predictor = Predictor(options.run)
    images = listing(options.images, images=options.place, id_columns=predictor.id_columns)
    # A bar would be drawn across rows that are printed.
    progress = bool(options.output) or not sys.stdout.isatty()
    outcome = write(
        predictor.predict(images, heatmaps=options.heatmap, progress=progress),
        predictor.classes,
        options.output,
        format_of(options.output, options.format),
        threshold=predictor.threshold,
        limit=predictor.known.limit,
    )
    for line in (*outcome.said(), *predictor.remarks, NOT_A_DEVICE):
        print(line, file=sys.stderr)
    sys.exit(1 if outcome.failed else 0)


def export(options: argparse.Namespace) -> None:
    """Write a bundle that runs without moleprint."""
    from eval.export import export, said

    found = export(options.run, options.format, options.output, images=options.images)
    print(f"bundle: {options.output}\n{said(found)}")


def compare(options: argparse.Namespace) -> None:
    """Two runs, or two recipes, on their test set."""
    from eval.compare import compare, said
    from shards.files import write_json

    first, second = options.runs, options.against
    if not second:
        if len(first) != 2:
            raise UserError(f"{len(first)} runs: give two, or those of the other recipe after --against")
        first, second = first[:1], first[1:]
    results = compare(first, second)
    if options.json:
        write_json(options.json, results)
    print("\n".join(said(results)))


def watch(options: argparse.Namespace) -> None:
    """Show a run live."""
    from launch.watch import watch

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        watch(options.run, once=options.once)


def doctor(options: argparse.Namespace) -> None:
    """Check this machine; status 1 if it cannot run."""
    from launch.doctor import examine

    folders: list[Path] = []
    if options.config:
        experiment = stages.Call.of(options.config, options.overrides).experiment
        places = (str(experiment.pack.output), str(experiment.run.folder))
        folders = [Path(place) for place in places if "://" not in place]
    sys.exit(examine(folders, as_json=options.json))


def inspect(options: argparse.Namespace) -> None:
    """What a shard set holds, or what the encoder is shown of it."""
    from shards.facts import describe
    from shards.shardset import ShardSet
    from shards.sheet import contact_sheet

    folder: Path | str = options.set
    if options.set.is_file() or options.overrides:
        experiment = stages.Call.of(options.set, options.overrides).experiment
        folder = experiment.pack.output
        if options.augmented:
            _inspect_augmented(experiment, options.sheet)
            return
    if options.augmented:
        raise UserError(f"{folder}: --augmented needs a configuration, which says how; give its YAML file")
    shards = ShardSet.open(folder)
    sheet = options.sheet or shards.folder.with_name(f"{shards.folder.name}.png")
    print("\n".join(describe(shards)))
    contact_sheet(shards, sheet)
    print(f"contact sheet: {sheet}")


def _inspect_augmented(experiment: Experiment, sheet: Path | None) -> None:
    from pipeline.augmented import augmented_sheet, strengths
    from shards.shardset import ShardSet

    shards = ShardSet.of(experiment)
    sheet = sheet or shards.folder.with_name(f"{shards.folder.name}-augmented.png")
    print(strengths(experiment.loader.augment))
    augmented_sheet(shards, experiment.loader, sheet, seed=experiment.train.seed)
    print(f"contact sheet: {sheet}")


def bench_loader(options: argparse.Namespace) -> None:
    """The loader beside its peers."""
    from pipeline.benchmark import bench

    bench(stages.Call.of(options.config, options.overrides).experiment, options.json)


def bench_step(options: argparse.Namespace) -> None:
    """A training step's wait for data."""
    from train.benchmark import bench

    bench(stages.Call.of(options.config, options.overrides).experiment, options.json)


def bench_train(options: argparse.Namespace) -> None:
    """A training step beside a plain script."""
    from train.throughput import bench

    bench(stages.Call.of(options.config, options.overrides).experiment, options.json)


def bench_shards(options: argparse.Namespace) -> None:
    """Packing beside its peers."""
    from pipeline.environment import environment
    from shards.benchmark import bench

    bench(options.images, options.json, environment())
