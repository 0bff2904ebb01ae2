"""How well the network writes by now: texts read on pictures of fixed prompts, counted as tools/evaluate.py counts."""

from mindsigma import command_line
from mindsigma.config_file import parse_with_config
from mindsigma.evaluation.ocr import ENGINES, Reader
from mindsigma.evaluation.textatlas import TextAtlas
from mindsigma.evaluation.words import Counts, count
from mindsigma.sampling.options import SamplingOptions
from mindsigma.sampling.options import add_arguments as add_sampling_arguments
from mindsigma.training.validation import evaluating


def build_parser():
    """The options of the file that `--evaluate` names."""
    parser = command_line.parser("Options of --evaluate.")
    add = parser.add_argument
    add("--config")
    add("--data", required=True, metavar="PATH", help="TextAtlasEval, or a JSON list in its layout")
    add("--subset", nargs="+", default=[])
    add("--limit", type=int, help="the first prompts of each subset alone")
    add("--ocr", choices=tuple(ENGINES), default="rapidocr")
    add("--ocr-setting", action="append", default=[])
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=1)
    add_sampling_arguments(parser)
    return parser


class TextEvaluation:
    """Scores of the prompts of a data set, shared by the processes.

    Args:
        config: path of a YAML file with the options of `build_parser`.
        pipeline: PixArtSigmaPipeline around the network that is trained.
        collectives: Collectives.
    """

    def __init__(self, config, pipeline, collectives):
        args = parse_with_config(build_parser(), ["--config", config])
        self.pipeline, self.collectives, self.seed, self.batch = pipeline, collectives, args.seed, args.batch_size
        self.sampling = SamplingOptions.of_arguments(args)
        ranks = collectives.ranks
        self.items = TextAtlas(args.data, args.subset, args.limit).items[ranks.rank :: ranks.count]
        self.reader = Reader(args.ocr, args.ocr_setting)
        count("a", "a")  # says what is not installed now, not at the first evaluation

    def __call__(self, training):
        """Draw, read, count. Returns dict of floats: text_f1, text_accuracy, text_precision, text_cer, text_hits."""
        whole = Counts()
        with evaluating(training):
            for start in range(0, len(self.items), self.batch):
                part = self.items[start : start + self.batch]
                result = self.pipeline(
                    [item.prompt for item in part],
                    seed=[self.seed + item.number for item in part],
                    progress=False,
                    **self.sampling.as_arguments(),
                )
                for item, image in zip(part, result.images):
                    whole += count(self.reader.read(image)[0], item.text)
        sums = [whole.hits, whole.read, whole.wanted, whole.error, whole.distance, whole.rated, whole.pictures]
        whole = Counts(*self.collectives.total(sums))
        return {
            "text_f1": whole.f1,
            "text_accuracy": whole.accuracy,
            "text_precision": whole.precision,
            "text_cer": whole.cer,
            "text_hits": whole.hits,
        }
