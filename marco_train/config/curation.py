"""What a curation builds, and of what."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marco_train.config.paths import CONFIG_DIR
from marco_train.config.secrets import note_secrets
from marco_train.errors import InputError, require, require_positive

CURATION_DIR = CONFIG_DIR / "curation"
MOST_REASKS = 2
"""An answer that is not what its schema says is asked for again this often."""
# The languages of the model card by their code; what FLORES and NLLB call them, and their names.
CARD_LANGUAGES = {
    "en": ("eng_Latn", "English"),
    "zh": ("zho_Hans", "Chinese"),
    "ar": ("arb_Arab", "Arabic"),
    "de": ("deu_Latn", "German"),
    "es": ("spa_Latn", "Spanish"),
    "fr": ("fra_Latn", "French"),
    "ko": ("kor_Hang", "Korean"),
    "ja": ("jpn_Jpan", "Japanese"),
    "pt": ("por_Latn", "Portuguese"),
    "tr": ("tur_Latn", "Turkish"),
    "id": ("ind_Latn", "Indonesian"),
    "it": ("ita_Latn", "Italian"),
    "nl": ("nld_Latn", "Dutch"),
    "pl": ("pol_Latn", "Polish"),
    "ru": ("rus_Cyrl", "Russian"),
    "vi": ("vie_Latn", "Vietnamese"),
    "th": ("tha_Thai", "Thai"),
    "he": ("heb_Hebr", "Hebrew"),
    "uk": ("ukr_Cyrl", "Ukrainian"),
    "ms": ("zsm_Latn", "Malay"),
    "bn": ("ben_Beng", "Bengali"),
    "cs": ("ces_Latn", "Czech"),
    "ur": ("urd_Arab", "Urdu"),
    "kk": ("kaz_Cyrl", "Kazakh"),
    "el": ("ell_Grek", "Greek"),
    "ro": ("ron_Latn", "Romanian"),
    "hu": ("hun_Latn", "Hungarian"),
    "ne": ("npi_Deva", "Nepali"),
    "az": ("azj_Latn", "Azerbaijani"),
}


class CurationKind(Enum):
    """Which pipeline."""

    translation = "translation"
    culture = "culture"
    science = "science"


def _open_numbers() -> Any:
    """Numbers to whose names the command line adds others without `+`."""
    return DictConfig({}, key_type=str, element_type=float, flags={"struct": False})


def _open_switches() -> Any:
    """Switches to whose names the command line adds others without `+`."""
    return DictConfig({}, key_type=str, element_type=bool, flags={"struct": False})


@dataclass(kw_only=True)
class LLMConfig:
    """An endpoint of the OpenAI API: `recipes/serve_teacher.sh`, or somebody's service."""

    base_url: str | None = None
    """As http://host:8000/v1. None: no LLM."""
    model: str | None = None
    """Its name there. None: the only one that is served."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is written nowhere."""
    concurrency: int = 16
    """Requests at a time."""
    timeout_seconds: float = 300.0
    """Of one request."""
    max_tries: int = 6
    """Of a request to which nothing comes back, with growing waits between them."""
    temperature: float = 0.7
    """Of sampling."""
    top_p: float = 1.0
    """Of sampling."""
    max_tokens: int = 2048
    """Of an answer."""
    seed: int = 42
    """Of sampling; several answers to one question have those that follow."""
    num_reasks: int = MOST_REASKS
    """Of an answer that is not what its schema says."""
    tokens_per_second: float = 1000.0
    """Of all requests together; the plan's hours follow from it."""

    def __post_init__(self) -> None:
        require_positive(
            "llm",
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            max_tries=self.max_tries,
            max_tokens=self.max_tokens,
            tokens_per_second=self.tokens_per_second,
        )
        require(
            0 <= self.num_reasks <= MOST_REASKS,
            f"llm.num_reasks is {self.num_reasks}, and must be 0 to {MOST_REASKS}",
        )
        require(
            self.base_url is None or self.base_url.startswith(("http://", "https://")),
            f"llm.base_url is {self.base_url!r}, and must begin with http:// or https://",
        )


@dataclass(kw_only=True)
class EmbeddingConfig:
    """A model of sentence-transformers."""

    model: str | None = None
    """Name or directory. None: no embeddings."""
    revision: str | None = None
    """Commit, tag or branch on the hub. None: the newest."""
    batch_size: int = 64
    """Texts."""
    device: str | None = None
    """As cuda or cpu. None: a GPU where there is one."""
    texts_per_second: float = 500.0
    """The plan's hours follow from it."""

    def __post_init__(self) -> None:
        require_positive(
            "embedding", batch_size=self.batch_size, texts_per_second=self.texts_per_second
        )


@dataclass(kw_only=True)
class QualityConfig:
    """Which faults of an answer drop its row; all are counted either way."""

    language: bool = True
    """It is in another language than the row's."""
    repetition: bool = True
    """It repeats itself."""
    refusal: bool = True
    """It declines to answer."""
    length: bool = True
    """It is shorter or longer than the bounds."""
    template: bool = True
    """Something of a template or of a prompt was left in it."""
    personal: bool = True
    """It has an e-mail address, a telephone, card or account number."""
    min_characters: int = 1
    """Of a text."""
    max_characters: int = 32_768
    """Of a text."""

    def __post_init__(self) -> None:
        require_positive(
            "quality", min_characters=self.min_characters, max_characters=self.max_characters
        )
        require(
            self.min_characters <= self.max_characters,
            f"quality.min_characters is {self.min_characters}, and must be at most "
            f"quality.max_characters, {self.max_characters}",
        )


@dataclass(kw_only=True)
class DecontaminationConfig:
    """Benchmarks whose questions no row may hold."""

    against: str | None = None
    """`card` or `fixture`, the questions that stage=benchmark asks, or a directory of .jsonl files
    whose text columns are questions. None: rows are not looked at."""
    data_dir: str | None = None
    """A folder for each set of the card that is read from files."""
    similarity: float = 0.9
    """Cosine from which a turn is near a question; asked of `embedding.model`, where there is
    one."""

    def __post_init__(self) -> None:
        require(
            0 < self.similarity <= 1,
            f"decontamination.similarity is {self.similarity}, and must be above 0 and up to 1",
        )


@dataclass(kw_only=True)
class CurationConfig:
    """What all pipelines have in common."""

    kind: CurationKind = MISSING
    """Set by the recipe."""
    input: str = MISSING
    """A file or a directory; what it holds is the pipeline's."""
    output_dir: str = MISSING
    """Takes <kind>.jsonl, <kind>.parquet, DATA_CARD.md, counts.json, samples.html, and the shards
    of each step below work/, from which a killed pipeline goes on."""
    languages: list[str] = MISSING
    """Codes of two letters, as [de,fr]."""
    seed: int = 42
    """Of what is drawn."""
    shard_rows: int = 2000
    """Rows that are written together; a killed pipeline redoes at most so many of one step."""
    processes: int = 2
    """That share the steps which look at rows one by one; each may take 0.6 GiB."""
    plan: bool = False
    """Whether to say what would be read and asked and how long it takes, and end there."""
    source_revision: str = ""
    """Of the input, for the data card, where its files do not say."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)

    def __post_init__(self) -> None:
        require_positive("the curation", shard_rows=self.shard_rows, processes=self.processes)
        self.languages = list(self.languages)
        require(bool(self.languages), "languages is empty: name one at least, as languages=[de]")
        for code in self.languages:
            require(
                code in CARD_LANGUAGES,
                f"languages names {code!r}, which is unknown; known are {' '.join(CARD_LANGUAGES)}",
            )
        require(
            len(set(self.languages)) == len(self.languages),
            f"languages names one twice: {' '.join(self.languages)}",
        )


@dataclass(kw_only=True)
class TranslationConfig(CurationConfig):
    """Pairs of NLLB, of English and another language."""

    max_pairs: int | None = 1_000_000
    """Lines that are read of each file, from its beginning, which has the highest scores. None: all
    of them, which are hundreds of millions of some languages."""
    rows_per_language: int = 10_000
    """The best that are kept (Marco-MoE, section 4.1)."""
    max_domain_share: float = 0.05
    """Of them from one web domain, where enough others remain."""
    language_model: str | None = None
    """File of a fastText model, as GlotLID's model.bin, that identifies languages. None: lingua
    where it knows the language, else NLLB's own columns."""
    near_duplicates: float | None = 0.8
    """Similarity (Jaccard, of strings of five characters) of English sides that count as one.
    None: only equal pairs do."""
    rules: dict[str, bool] = field(default_factory=_open_switches)
    """Rules of the text that are switched on or off, by name; the data card lists them all."""
    thresholds: dict[str, float] = field(default_factory=_open_numbers)
    """Bounds of rules, by name, where they are others than the data card's sources say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rules, self.thresholds = dict(self.rules), dict(self.thresholds)
        require_positive(
            "the translation",
            rows_per_language=self.rows_per_language,
            max_pairs=self.max_pairs,
        )
        for name, share in (
            ("max_domain_share", self.max_domain_share),
            ("near_duplicates", self.near_duplicates),
        ):
            require(
                share is None or 0 < share <= 1,
                f"{name} is {share}, and must be a share above 0 and up to 1",
            )
        require(
            "en" not in self.languages,
            "languages names en, which is the other side of every pair: leave it out",
        )


@dataclass(kw_only=True)
class CultureConfig(CurationConfig):
    """Questions on entities of Wikidata, in the language of their country."""

    entities_per_language: int = 2_000
    """The most popular ones, as many of each topic as of others."""
    min_articles: int = 5
    """Wikipedias that have an article on an entity."""
    min_facts: int = 4
    """Without which nothing is written on it."""
    choice_share: float = 0.5
    """Of the entities that are also asked for with choices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "the culture",
            entities_per_language=self.entities_per_language,
            min_articles=self.min_articles,
            min_facts=self.min_facts,
        )
        require(
            0 <= self.choice_share <= 1,
            f"choice_share is {self.choice_share}, and must be a share from 0 to 1",
        )


@dataclass(kw_only=True)
class ScienceConfig(CurationConfig):
    """Answers to the prompts of a set."""

    subset: str | None = None
    """Configuration of a set of the hub. None: its default."""
    split: str = "train"
    """Of a set of the hub."""
    prompts_per_language: int = 20_000
    """Drawn from those that the set has."""
    num_samples: int = 4
    """Responses to a prompt."""
    min_agreement: float = 0.5
    """Share of a prompt's responses that end in one answer, where the set has none of its own."""
    only_confirmed: bool = False
    """Whether prompts whose responses end in no answer that can be compared are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "the science",
            prompts_per_language=self.prompts_per_language,
            num_samples=self.num_samples,
        )
        require(
            0 < self.min_agreement <= 1,
            f"min_agreement is {self.min_agreement}, and must be a share above 0 and up to 1",
        )


CURATIONS: dict[str, type[CurationConfig]] = {
    CurationKind.translation.value: TranslationConfig,
    CurationKind.culture.value: CultureConfig,
    CurationKind.science.value: ScienceConfig,
}


def to_curation(composed: DictConfig) -> CurationConfig:
    """Make the typed config of what Hydra composed.

    Raises:
        InputError: A value is out of its bounds or was not given.
    """
    note_secrets(composed)
    for key, how in (("input", "input=<file or directory>"), ("output_dir", "output_dir=<new>")):
        require(not OmegaConf.is_missing(composed, key), f"{key} was not given: add {how}")
    try:
        found: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        raise InputError(str(error).splitlines()[0]) from error
    return found  # type: ignore[no-any-return]
