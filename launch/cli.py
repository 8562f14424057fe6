"""The `moleprint` command.

moleprint VERB CONFIG [section.key=value …]
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import StageError, UserError
from configs.help import describe
from configs.schema import Experiment
from launch import job, stages, verbs

# Stage verb: (its function, the sections it reads, what it does).
STAGE_VERBS: dict[str, tuple[Callable[[stages.Call], None], tuple[str, ...], str]] = {
    "synthesize": (stages.synthesize, ("synthetic", "pack"), "draw a synthetic data set"),
    "pack": (stages.pack, ("pack",), "pack a table and its images into shards"),
    "train": (
        stages.train,
        ("pack", "loader", "model", "loss", "train", "tracking", "run"),
        "train the encoder, or go on from its newest checkpoint",
    ),
    "embed": (
        stages.embed,
        ("pack", "loader", "train", "embed", "run"),
        "embed every sample with the trained encoder",
    ),
    "classify": (
        stages.classify,
        ("classifier", "tracking", "run"),
        "fit the classifier and its baselines on the embeddings",
    ),
    "evaluate": (stages.evaluate, ("pack", "evaluate", "tracking", "run"), "write the report"),
    "run": (stages.run_all, tuple(Experiment.model_fields), "all stages, skipping what is finished"),
}
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with status 2 and one line a mistake."""
    if not sys.stderr.isatty():  # a log file: a progress line now and then, not ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    options = _parse(arguments)
    try:
        options.action(options)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except StageError as error:  # the stage's own processes have said why
        sys.exit(error.status)
    except KeyboardInterrupt:
        print(
            "interrupted; run it again: what is finished stays, training goes on from its newest checkpoint",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; changes to the configuration may come before and after others, which argparse cannot."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "moleprint", description="From a table of dermoscopy photographs to a report. Not a medical device."
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(
        name: str, text: str, sections: Sequence[str] = (), epilog: str | None = None
    ) -> argparse.ArgumentParser:
        fields = f"fields (section.key=value):\n\n{describe(sections)}" if sections else epilog
        return subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=fields,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for name, (action, sections, text) in STAGE_VERBS.items():
        verb = add(name, text, sections)
        verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/demo.yaml")
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
        verb.set_defaults(action=lambda o, action=action: action(stages.Call.of(o.config, o.overrides)))

    verb = add("demo", "the whole path on drawn lesions, in minutes", tuple(Experiment.model_fields))
    verb.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to configs/demo.yaml"
    )
    verb.set_defaults(action=lambda o: stages.run_all(stages.Call.of(DEMO, o.overrides)))

    _add_launch(add("launch", LAUNCH, ("train",)))

    verb = add("verify", "prove from the shards alone that a set is whole and does not leak")
    verb.add_argument("folder", metavar="FOLDER", help="shard set")
    verb.add_argument("--quick", action="store_true", help="skip decoding every image")
    verb.set_defaults(action=verbs.verify)

    verb = add("predict", "probability, verdict and nearest known lesions of images", epilog=PREDICT)
    verb.add_argument(
        "run", type=Path, metavar="RUN", help="run folder with a trained encoder and classifier"
    )
    verb.add_argument("images", nargs="+", metavar="IMAGES", help="what to look at, as below")
    verb.add_argument("--output", type=Path, metavar="FILE", help="file to write; printed if not given")
    verb.add_argument(
        "--format", choices=("csv", "jsonl"), help="as FILE's ending says if not given, else csv"
    )
    verb.add_argument("--images", dest="place", metavar="PLACE", help="where the ids of a table are sought")
    verb.add_argument("--heatmap", type=Path, metavar="FOLDER", help="write a Grad-CAM picture of each image")
    verb.set_defaults(action=verbs.predict)

    verb = add("export", "a bundle of encoder, classifier and calibration that runs without moleprint")
    verb.add_argument(
        "run", type=Path, metavar="RUN", help="run folder with a trained encoder and classifier"
    )
    verb.add_argument("--format", required=True, choices=("onnx", "torch-export", "safetensors"))
    verb.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="bundle to write")
    verb.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGES",
        help="real images to check it on, as for predict; those of the run's shard set if not given",
    )
    verb.set_defaults(action=verbs.export)

    verb = add("compare", "two runs, or two recipes of several, on their test set: paired bootstrap, DeLong")
    verb.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, embedded and classified"
    )
    verb.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="runs of the other recipe, such as its seeds; if not given, the second RUN is the other",
    )
    verb.add_argument("--json", type=Path, metavar="FILE", help="all figures, for machines")
    verb.set_defaults(action=verbs.compare)

    verb = add("watch", "a live view of a run folder in the terminal, also of a run on another host")
    verb.add_argument("run", type=Path, metavar="RUN", help="run folder; its metrics.jsonl is read")
    verb.add_argument("--once", action="store_true", help="show it once and end")
    verb.set_defaults(action=verbs.watch)

    verb = add("doctor", "check this machine, with a remedy for what is amiss; status 1 if it cannot run")
    verb.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="YAML file whose folders are tried"
    )
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
    verb.add_argument("--json", action="store_true", help="print what was found for machines")
    verb.set_defaults(action=verbs.doctor)

    verb = add("inspect", "show what a shard set holds: a table, and a contact sheet of its images")
    verb.add_argument("set", type=Path, metavar="SET", help="shard set, or a configuration that names one")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to a configuration")
    verb.add_argument(
        "--augmented", action="store_true", help="show training images beside their augmented versions"
    )
    verb.add_argument("--sheet", type=Path, metavar="FILE", help="PNG to write; SET.png if not given")
    verb.set_defaults(action=verbs.inspect)

    _add_bench(subparsers.add_parser("bench", help="measure, with peers in the same run", description=BENCH))
    return parser


PREDICT = """IMAGES are any of
  photo.jpg          image files, of any format that is packed
  photos/ 'p/*.png'  folders and all below them; globs
  table.csv          CSV, TSV or Parquet, with a column `path` (from the table's folder on) or an id
  set.zip set.hdf5   archives
  shards/            shard sets; 'shards-{000..009}.tar', https://… and `::`: WebDataset shards
  -                  a path a line on standard input

An image that cannot be used has a line with its `error`, the rest go on, and the status is 1 in the end.
Probabilities are calibrated. `distance` is that to the 10th nearest training image: where it exceeds
`distance_limit`, that of 99% of the validation images, it is out of distribution, its verdict a guess."""
LAUNCH = "run a stage on GPUs of this host, of several, or under SLURM; shows the call before it makes it"


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/demo.yaml")
    launch.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
    launch.add_argument("--stage", choices=job.STAGES, default="train", help="what to run; default train")
    launch.add_argument(
        "--gpus", type=int, metavar="N", help="on each host, a process each; train.processes if not given"
    )
    launch.add_argument(
        "--nodes", default=os.environ.get("PET_NNODES", "1"), metavar="N", help="hosts, or MIN:MAX; default 1"
    )
    launch.add_argument(
        "--rendezvous",
        default=os.environ.get("PET_RDZV_ENDPOINT", ""),
        metavar="HOST:PORT",
        help="where several hosts meet: one of them; start the same command on each",
    )
    launch.add_argument(
        "--max-restarts",
        type=int,
        default=os.environ.get("PET_MAX_RESTARTS"),
        metavar="N",
        help=f"times to start again after a lost rank; default {job.RESTARTS} with several hosts, else 0",
    )
    launch.add_argument("--slurm", action="store_true", help="hand the job to SLURM, with sbatch")
    launch.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch: --sbatch=--partition=gpu"
    )
    launch.add_argument("--dry-run", action="store_true", help="show the call, and make none")
    launch.set_defaults(action=verbs.launch)


BENCH = "Measure, with peers in the same run on the same images."


def _add_bench(bench: argparse.ArgumentParser) -> None:
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

    def add(
        name: str, text: str, sections: Sequence[str], action: Callable[[argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        subject = subjects.add_parser(
            name,
            help=text,
            epilog=f"fields (section.key=value):\n\n{describe(sections)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subject.add_argument("config", type=Path, metavar="CONFIG", help="YAML file whose shard set is read")
        subject.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
        subject.set_defaults(action=action)
        return subject

    text = "images/s, CPU time and memory of the loader beside PyTorch's, webdataset's and DALI's own"
    loader = add("loader", text, ("pack", "loader", "train"), verbs.bench_loader)
    text = "share of a training step spent waiting for data, beside the step on a resident batch"
    step = add("step", text, ("pack", "loader", "model", "loss", "train"), verbs.bench_step)
    text = "images/s of a training step beside a plain PyTorch script"
    training = add("train", text, ("pack", "loader", "model", "loss", "train"), verbs.bench_train)

    shards = subjects.add_parser("shards", help="images/s of packing beside ShardWriter, tar and Pillow")
    shards.add_argument(
        "--images", type=int, default=12000, metavar="N", help="images that are made up for it; default 12000"
    )
    shards.set_defaults(action=verbs.bench_shards)

    for subject in (loader, step, shards, training):
        subject.add_argument("--json", type=Path, metavar="FILE", help="rows and environment, for machines")


if __name__ == "__main__":
    main()
