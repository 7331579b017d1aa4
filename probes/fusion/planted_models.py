"""Small LLaVA models built by hand, of which it is known in which layer the picture is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

# The vocabulary: a token's id is its place. Pictures and hints have a colour, ANSWERS[red + 2 * blue].
COLOURS = ("black", "red", "blue", "purple")
WORDS = ("<pad>", "<bos>", "<image>", "the", "what", "colour", "not", *(f"hint:{c}" for c in COLOURS), *COLOURS)
PAD, BOS, IMAGE, FILLERS, HINTS, ANSWERS = 0, 1, 2, range(3, 7), range(7, 11), range(11, 15)

# A picture is 2 x 2 patches of 4 x 4 pixels.
PATCHES, PATCH, SIDE = 4, 4, 8
# Dimensions of the residual stream. What a token is: the first token, a visual one, text, a hint.
FIRST, VISION, TEXT, HINT = range(4)
# What it shows (red or not, blue or not), what it is going to answer; the last one evens out the norms.
SHOWN, ANSWER, BALANCE = (4, 5), (6, 7), 8
WIDTH = 16
# The two dimensions of a head that turn slowest under rotary embedding turn together.
TO_PICTURE, TO_FIRST = WIDTH // 2 - 1, WIDTH - 1
# Attention scores: e^-200 is 0 in float32, so that no trace of the picture leaks, however small: read-outs rescale.
SCORE = 200.0
# Logit of the right answer over one that is wrong in a colour; e^-40 is left for all the wrong ones.
LOGIT = 40.0


@dataclass(frozen=True, eq=False)
class Samples:
    """Questions about the colour of a picture.

    Attributes:
        inputs: What the model is called with, left-padded: `input_ids` and `attention_mask` `[samples, positions]`,
            `pixel_values` `[samples, 3, 8, 8]`.
        colours: `[samples]`, of the picture: an index into `COLOURS`. Independent of the text.
        hints: `[samples]`, the colour that the text names.
        answers: `[samples]`, the token that is right: the picture's colour, or for the text-only control the hint's.
    """

    inputs: dict[str, Tensor]
    colours: Int[Tensor, " samples"]
    hints: Int[Tensor, " samples"]
    answers: Int[Tensor, " samples"]

    def score(self, logits: Float[Tensor, "samples positions vocabulary"]) -> Float[Tensor, " samples"]:
        """Log-probability (nats) of the right answer after the last position: 0 when sure, -ln 4 when guessing.

        The logits of the four answers are a sum over the two colours, so a model that has seen one of them only
        stands at -ln 2: what two layers contribute adds up.
        """
        return logits[:, -1].float().log_softmax(-1).gather(1, self.answers.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class Planted:
    """A model and what it does.

    Attributes:
        model: Answers what colour the picture has, or, the control, which colour the text names.
        reads: Layers, counted from 1, in which text reads the picture; none for the control.
    """

    model: LlavaForConditionalGeneration
    reads: tuple[int, ...]

    def samples(self, count: int, seed: int = 0) -> Samples:
        """`count` questions, of which each four in a row show the four colours. Texts differ in length and wording.

        A row is padding, the first token, text, the picture, text, a hint (`hint:red`) and text again. Pixels are
        -1 or 1 in the first and in the last channel, with Gaussian noise of 0.3.
        """
        generator = torch.Generator().manual_seed(seed)
        colours = torch.arange(count) % len(COLOURS)
        hints = torch.randint(len(COLOURS), (count,), generator=generator)
        before, after = 4, 3
        length = before + PATCHES + after + 2
        input_ids = torch.randint(FILLERS.start, FILLERS.stop, (count, length), generator=generator)
        place = torch.arange(length)
        first = torch.randint(before, (count, 1), generator=generator)
        input_ids[place < first] = PAD
        input_ids[place == first] = BOS
        input_ids[:, before : before + PATCHES] = IMAGE
        input_ids[:, before + PATCHES + 1] = HINTS.start + hints
        channels = torch.stack([colours % 2, torch.zeros(count, dtype=torch.long), colours // 2], -1) * 2.0 - 1
        noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD).long(),
            "pixel_values": channels[:, :, None, None] + 0.3 * noise,
        }
        return Samples(inputs, colours, hints, ANSWERS.start + (colours if self.reads else hints))


def planted(layer: int | tuple[int, int] | None, layers: int) -> Planted:
    """Builds a LLaVA that answers from the picture and reads it in one known layer; nothing is trained.

    In layer k every text token after the picture puts all its attention on the visual tokens; in all other layers, and
    where the picture is out of sight, all of it rests on the first token, which holds nothing. MLPs and the tower's
    encoder layer are zero. So what the picture shows reaches the answer through the attention of layer k
    alone, the visual tokens themselves never change, and vision is not needed before or after layer k.

    Args:
        layer: k, counted from 1. A pair (j, k): layer j reads whether there is red in the picture, layer k whether
            there is blue, and each contributes half of the answer's log-probability. None, the text-only control: its
            middle layer reads the hint in the text as others read the picture, and no layer attends to the picture.
        layers: Of the decoder.

    Raises:
        ValueError: A layer outside 1 to `layers`, or a pair that is not in ascending order.
    """
    reads = () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    if len(reads) > 2 or list(reads) != sorted(set(reads)) or not all(1 <= read <= layers for read in reads):
        raise ValueError(f"layer is {layer}: name one of 1 to {layers}, two of them in ascending order, or None")
    with torch.random.fork_rng(devices=[]):  # transformers draws weights at first
        model = LlavaForConditionalGeneration(_config(layers)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name or name.endswith("bias"):
            parameter.zero_()
    _build_tower(model)
    _build_words(model)
    colours = {reads[0]: (0,), reads[1]: (1,)} if len(reads) == 2 else {}
    for number, decoder_layer in enumerate(model.model.language_model.layers, start=1):
        source = VISION if number in reads else HINT if not reads and number == (layers + 1) // 2 else None
        _build_attention(decoder_layer.self_attn, source, colours.get(number, (0, 1)))
    return Planted(model, reads)


def _config(layers: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=4,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        # The slowest pair of dimensions turns by 1e-7 a position: attention does not depend on distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    # The features are the tower's embeddings, before its one encoder layer.
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)


def _build_tower(model: LlavaForConditionalGeneration) -> None:
    """From pixels to visual tokens: the mean of the first and last channel of a patch, +-1 after the layer norm."""
    patches = model.get_submodule("model.vision_tower.embeddings.patch_embedding")
    for row, (channel, sign) in enumerate([(0, 1), (2, 1), (0, -1), (2, -1)]):
        patches.weight[row, channel] = sign / PATCH**2
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    # gelu(x) - gelu(-x) = x: the projector is linear.
    for colour, shown in enumerate(SHOWN):
        first.weight[2 * colour, colour], first.weight[2 * colour + 1, colour] = 1, -1
        second.weight[shown, 2 * colour], second.weight[shown, 2 * colour + 1] = 1, -1
    second.bias[VISION] = 1
    second.bias[BALANCE] = (WIDTH - 3) ** 0.5


def _build_words(model: LlavaForConditionalGeneration) -> None:
    """Every token has norm 4, for which RMSNorm in 16 dimensions changes nothing; and the head."""
    words = model.get_input_embeddings().weight
    words[BOS, FIRST] = 1
    words[FILLERS.start :, TEXT] = 1
    words[IMAGE, VISION] = 1
    shown = torch.tensor([[1.0 if colour >> bit & 1 else -1.0 for bit in (0, 1)] for colour in range(len(COLOURS))])
    words[HINTS.start : HINTS.stop, HINT] = 1
    words[HINTS.start : HINTS.stop, list(SHOWN)] = shown
    words[:, BALANCE] = (WIDTH - words.square().sum(-1)).sqrt()

    head = model.get_output_embeddings().weight
    head[:, TEXT] = -LOGIT
    head[ANSWERS.start : ANSWERS.stop, TEXT] = 0
    head[ANSWERS.start : ANSWERS.stop, list(ANSWER)] = LOGIT / 2 * shown


def _build_attention(attention: nn.Module, source: int | None, colours: tuple[int, ...]) -> None:
    """Text attends to `source`, everything else and what does not see it to the first token.

    Colours shown where it attends are carried to the answer; the first token shows none.
    """
    # The square root of the head's width undoes the scaling of the scores.
    score = SCORE * WIDTH**0.5
    attention.q_proj.weight[TO_FIRST, [FIRST, VISION, TEXT]] = 1
    attention.k_proj.weight[TO_FIRST, FIRST] = score
    if source is not None:
        attention.q_proj.weight[TO_PICTURE, TEXT] = 1
        attention.k_proj.weight[TO_PICTURE, source] = 2 * score
    for colour in colours:
        attention.v_proj.weight[colour, SHOWN[colour]] = 1
        attention.o_proj.weight[ANSWER[colour], colour] = 1
