"""The shape of a MemGPT core."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # transformers' names, which its caches and masks expect

# The shapes that `pretrain.preset` selects. The last layer of each group of three to five is global.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL],
        "sliding_window": 128,
        "memory_rows": 16384,
        "memory_dim": 32,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": [LOCAL, LOCAL, GLOBAL] * 2,
        "sliding_window": 256,
        "memory_rows": 65536,
        "memory_dim": 64,
    },
    "base": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": [LOCAL, LOCAL, LOCAL, LOCAL, GLOBAL] * 2,
        "sliding_window": 256,
        "memory_rows": 262144,
        "memory_dim": 96,
    },
}


@strict
class MemGPTConfig(PreTrainedConfig):
    """Configuration of every MemGPT class.

    layer_types: "full_attention" or "sliding_attention" per layer; None makes all full. sliding_window: how many tokens
    a sliding layer sees: causally the last ones, the token itself included; bidirectionally as many on each side.
    qk_norm … position_embedding: variants of other model families, so that `memgpt convert` can load their weights.
    memory_layers: indices of the blocks with an n-gram memory, which all read one table; empty makes a plain GPT.
    memory_ngrams: lengths n of the n-grams that are looked up.
    memory_heads: hash functions per n, each of which reads one table row.
    memory_rows: rows per hash head; memory_dim: width of a row.
    memory_kernel: taps of the memory's causal depthwise convolution; 0 for none.
    recall_length: longest run of last tokens to search for earlier in the text, to recall the token that followed it; 0
        disables recall; None: 4 with a memory, 0 without. recall_window: how many tokens back the search goes.
    dropout: on the output of each residual branch and before each head.
    pooled_size: width of the two-tower vectors of recommendation.
    similarity_temperature: of the softmax over items in recommendation.
    window: subword tokens per window in the understanding tasks; max_history: how many of a user's items are used.
    task_labels: task → labels; task_balancing: a learned weight for each task's loss. For the multi-task class only.
    topics: names of the texts' topics, predicted by a second head beside that of the labels; None for no such head.
    label_temperature: divides the labels' logits in predictions, so that their softmax is calibrated.
    outside_bias: subtracted from the log-probability of the tag "outside" when a text's tags are chosen.
    word_vote_rows: rows of the table of word votes for the label of a token or a text (word_votes.py); 0 for none.
    word_vote_weight: weight of these votes in the logits of predictions; training leaves them out.
    prefix_length: trained keys and values in each layer that all tokens see, for the understanding tasks; 0 for none.
    """

    model_type = "memgpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads the class attribute)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    gated_mlp: bool = True
    mlp_bias: bool = False
    norm: str = "rms"
    position_embedding: str = "rotary"
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    mask_token_id: int | None = 2
    memory_layers: list[int] | None = None
    memory_ngrams: list[int] | None = None
    memory_heads: int = 2
    memory_rows: int = 8192
    memory_dim: int = 32
    memory_kernel: int = 4
    recall_length: int | None = None
    recall_window: int = 512
    pooled_size: int = 64
    similarity_temperature: float | int = 0.07
    window: int = 128
    max_history: int = 10
    task_labels: dict[str, list[str]] | None = None
    task_balancing: bool = False
    topics: list[str] | None = None
    label_temperature: float | int = 1.0
    outside_bias: float | int = 0.0
    word_vote_rows: int = 0
    word_vote_weight: float | int = 0.0
    prefix_length: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory_layers is None:
            self.memory_layers = [layer for layer in (0, 2, 4) if layer < self.num_hidden_layers]
        if self.memory_ngrams is None:
            self.memory_ngrams = [1, 2, 3]
        if self.recall_length is None:
            self.recall_length = 4 if self.memory_layers else 0
        if self.layer_types is None:
            self.layer_types = [GLOBAL] * self.num_hidden_layers
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of "
                    f"num_attention_heads={self.num_attention_heads}, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.gated_mlp:
            plan = self.base_model_tp_plan
            self.base_model_tp_plan = {name: way for name, way in plan.items() if not name.endswith(".gate_proj")}
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but another architecture is an error; transformers would warn and use random weights.

        Raises:
            ValueError: if the checkpoint is of another architecture.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (kind := values.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a checkpoint of {kind!r}, not of {cls.model_type!r}; "
                "take it over with `memgpt convert`, or load it with transformers' Auto classes"
            )
        return values, kwargs

    def validate_architecture(self) -> None:
        """Check that the shape can be built.

        Raises:
            ValueError: naming the invalid fields and the fix.
        """
        if (self.head_dim or 0) % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (hidden_size / num_attention_heads) must be even: positions turn pairs"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        self._validate_choices()
        layers = self.memory_layers or []
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(f"memory_layers={layers} must lie within the {self.num_hidden_layers} layers, from 0")
        sizes = {"memory_heads": 1, "memory_rows": 1, "memory_dim": 1, "memory_kernel": 0}
        for name, least in (sizes | {"recall_length": 0, "recall_window": 1}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more")
        ngrams = self.memory_ngrams or []
        if any(n < 1 for n in ngrams) or (layers and not ngrams):
            raise ValueError(
                f"memory_ngrams={self.memory_ngrams} must be 1 or more each, and one at least; "
                "memory_layers=[] makes a model without memory"
            )

    def _validate_choices(self) -> None:
        types = self.layer_types or []
        if unknown := sorted(set(types) - {LOCAL, GLOBAL}):
            raise ValueError(f"layer_types: unknown {unknown[0]!r}; expected {LOCAL!r} or {GLOBAL!r}")
        if len(types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(types)} layers, num_hidden_layers={self.num_hidden_layers}")
        if LOCAL in types and not (self.sliding_window and self.sliding_window > 0):
            raise ValueError(f"layer_types has {LOCAL!r} layers: give sliding_window, the tokens that they see")
        for name, allowed in (("norm", ("rms", "layer")), ("position_embedding", ("rotary", "learned"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
