"""Small LLaVA models with hand-set weights, for which the layer that reads the image is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from probes.tokens.token_map import TokenMap

# Colours of images and hints. The index of a colour is red + 2 * blue; its answer token is ANSWER_IDS[index].
COLOURS = ("black", "red", "blue", "purple")
# A token's id is its index.
VOCABULARY = ("<pad>", "<bos>", "<image>", "the", "what", "colour", "not", *(f"hint:{c}" for c in COLOURS), *COLOURS)
PAD_ID, BOS_ID, IMAGE_ID = 0, 1, 2
FILLER_IDS, HINT_IDS, ANSWER_IDS = range(3, 7), range(7, 11), range(11, 15)

# An image is 2 x 2 patches of 4 x 4 pixels.
PATCHES_PER_IMAGE, PATCH_SIDE, IMAGE_SIDE = 4, 4, 8

# Dimensions of the residual stream. One marks what a token is: the first token, a visual token, text, a hint.
FIRST_DIM, VISION_DIM, TEXT_DIM, HINT_DIM = range(4)
# Two hold the colour that a token shows (red or not, blue or not), two the colour it will answer.
SHOWN_DIMS, ANSWER_DIMS = (4, 5), (6, 7)
# One makes all norms equal.
BALANCE_DIM = 8
WIDTH = 16
# The two dimensions of a head with the slowest rotary embedding; they rotate together.
TO_SOURCE_DIM, TO_FIRST_DIM = WIDTH // 2 - 1, WIDTH - 1
# e^-200 is 0 in float32. Any trace of the image that leaked, however small, would reach a read-out, which rescales.
ATTENTION_SCORE = 200.0
# Logit of the right answer over an answer that is wrong in one colour; all wrong answers together keep about e^-40.
ANSWER_LOGIT = 40.0


@dataclass(frozen=True, eq=False)
class PlantedSamples:
    """Questions about the colour of an image.

    Attributes:
        inputs: Arguments of the model's forward call, left-padded: `input_ids` and `attention_mask`
            `[samples, positions]`, `pixel_values` `[samples, 3, 8, 8]`.
        colours: Colour of each image, `[samples]`, an index into `COLOURS`. Independent of the text.
        hints: Colour that the text names, `[samples]`, an index into `COLOURS`.
        answers: Right token of each sample, `[samples]`: the image's colour, or the hint's for the text-only control.
    """

    inputs: dict[str, Tensor]
    colours: Int[Tensor, " samples"]
    hints: Int[Tensor, " samples"]
    answers: Int[Tensor, " samples"]

    def score(self, logits: Float[Tensor, "samples positions vocabulary"]) -> Float[Tensor, " samples"]:
        """Return the log-probability (nats) of the right answer after the last position.

        It is 0 for a certain answer and -ln 4 for a guess. The logit of an answer is a sum over the two colours, so a
        model that has read only one of them scores -ln 2: the contributions of two layers add up.
        """
        return logits[:, -1].float().log_softmax(-1).gather(1, self.answers.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class PlantedPairs:
    """Minimal pairs: questions that differ in one of the two properties of the image's colour, red or blue.

    Attributes:
        model: The model that they are made for.
        inputs: Arguments of its forward call. Rows 2p and 2p + 1 are pair p.
        answers: Colour of each image as a token, `[pairs, 2]`. The text-only control answers with the hint instead.
    """

    model: LlavaForConditionalGeneration
    inputs: dict[str, Tensor]
    answers: Int[Tensor, "pairs 2"]

    @property
    def arguments(self) -> tuple[LlavaForConditionalGeneration, TokenMap, dict[str, Tensor], Tensor]:
        """The arguments of `probes.interventions.swapping.swap_images`."""
        return self.model, TokenMap.from_inputs(self.model, self.inputs), self.inputs, self.answers


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """A model with the layers in which its text reads the image.

    Attributes:
        model: Answers with the image's colour; the control answers with the colour that the text names.
        reads: Layers, counted from 1, in which text reads the image; empty for the control.
    """

    model: LlavaForConditionalGeneration
    reads: tuple[int, ...]

    def samples(self, count: int, seed: int = 0) -> PlantedSamples:
        """Generate questions whose texts differ in length and wording.

        A row is padding, the first token, text, the image, text, a hint (`hint:red`) and text again. Each four
        consecutive samples show the four colours. Pixels are -1 or 1 in the first and the last channel, with Gaussian
        noise of standard deviation 0.3.

        Args:
            count: Number of questions.
            seed: Seed of texts, hints and noise.

        Returns:
            The questions with their answers.

        Example:
            >>> questions = planted(layer=2, layers=4).samples(8)
            >>> [COLOURS[colour] for colour in questions.colours[:4]]
            ['black', 'red', 'blue', 'purple']
        """
        generator = torch.Generator().manual_seed(seed)
        colours = torch.arange(count) % len(COLOURS)
        hints = torch.randint(len(COLOURS), (count,), generator=generator)
        before, after = 4, 3
        length = before + PATCHES_PER_IMAGE + after + 2
        input_ids = torch.randint(FILLER_IDS.start, FILLER_IDS.stop, (count, length), generator=generator)
        position = torch.arange(length)
        bos_position = torch.randint(before, (count, 1), generator=generator)
        input_ids[position < bos_position] = PAD_ID
        input_ids[position == bos_position] = BOS_ID
        input_ids[:, before : before + PATCHES_PER_IMAGE] = IMAGE_ID
        input_ids[:, before + PATCHES_PER_IMAGE + 1] = HINT_IDS.start + hints
        channels = torch.stack([colours % 2, torch.zeros(count, dtype=torch.long), colours // 2], -1) * 2.0 - 1
        noise = torch.randn(count, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD_ID).long(),
            "pixel_values": channels[:, :, None, None] + 0.3 * noise,
        }
        return PlantedSamples(inputs, colours, hints, ANSWER_IDS.start + (colours if self.reads else hints))

    def pairs(self, count: int, changed: Literal["red", "blue"], seed: int = 0) -> PlantedPairs:
        """Generate questions in two versions, whose images differ in red alone or in blue alone.

        Text and noise are the same. Red changes black to red and blue to purple, blue changes black to blue and red to
        purple, and the reverse.

        Args:
            count: Number of pairs.
            changed: The property that differs.
            seed: Seed of texts, hints and noise.

        Returns:
            The pairs with their answers.

        Example:
            >>> pairs = planted(layer=2, layers=4).pairs(4, changed="blue")
            >>> [[VOCABULARY[token] for token in pair] for pair in pairs.answers]
            [['black', 'blue'], ['red', 'purple'], ['blue', 'black'], ['purple', 'red']]
        """
        samples, bit = self.samples(count, seed), ("red", "blue").index(changed)
        inputs = {name: value.repeat_interleave(2, dim=0) for name, value in samples.inputs.items()}
        inputs["pixel_values"][1::2, 2 * bit] -= 2 * ((samples.colours >> bit & 1) * 2.0 - 1)[:, None, None]
        colours = torch.stack([samples.colours, samples.colours ^ (1 << bit)], dim=1)
        return PlantedPairs(self.model, inputs, ANSWER_IDS.start + colours)


def planted(layer: int | tuple[int, int] | None, layers: int) -> PlantedModel:
    """Build a LLaVA that answers from the image and reads it in one known layer, without training.

    In layer k every text token after the image puts all its attention on the visual tokens. In all other layers it puts
    all attention on the first token, which holds nothing; so does any token that cannot attend to the image. MLPs and
    the encoder layer of the vision tower are zero. The image therefore reaches the answer through the attention of
    layer k alone, visual tokens never change, and vision is not needed before or after layer k.

    Args:
        layer: k, counted from 1. A pair (j, k): layer j reads whether the image is red, layer k whether it is blue,
            and each contributes half of the answer's log-probability. None builds the text-only control: its middle
            layer reads the hint in the text in the same way, and no layer attends to the image.
        layers: Number of decoder layers.

    Returns:
        The model with the layers that read the image.

    Raises:
        ValueError: A layer is outside 1 to `layers`, or a pair is not in ascending order.

    Example:
        >>> reference = planted(layer=2, layers=4)
        >>> questions = reference.samples(8)
        >>> logits = reference.model(**questions.inputs).logits
        >>> bool((logits[:, -1].argmax(-1) == questions.answers).all())
        True
    """
    reads = () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    if len(reads) > 2 or list(reads) != sorted(set(reads)) or not all(1 <= read <= layers for read in reads):
        raise ValueError(f"layer is {layer}: name one of 1 to {layers}, two of them in ascending order, or None")
    with torch.random.fork_rng(devices=[]):  # transformers draws random weights on construction
        model = LlavaForConditionalGeneration(_config(layers)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name or name.endswith("bias"):
            parameter.zero_()
    _set_vision_weights(model)
    _set_embeddings_and_head(model)
    colours_by_layer = {reads[0]: (0,), reads[1]: (1,)} if len(reads) == 2 else {}
    for number, decoder_layer in enumerate(model.model.language_model.layers, start=1):
        source = VISION_DIM if number in reads else HINT_DIM if not reads and number == (layers + 1) // 2 else None
        _set_attention(decoder_layer.self_attn, source, colours_by_layer.get(number, (0, 1)))
    return PlantedModel(model, reads)


def _config(layers: int) -> LlavaConfig:
    """Return the configuration of a one-head LLaVA with 16 hidden dimensions."""
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=4,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        # The slowest pair of dimensions rotates by 1e-7 a position: attention does not depend on distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    # The features are the embeddings of the vision tower, before its one encoder layer.
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-2)


def _set_vision_weights(model: LlavaForConditionalGeneration) -> None:
    """Make visual tokens show the mean of a patch's first and last channel, as +-1 after the layer norm."""
    patches = model.get_submodule("model.vision_tower.embeddings.patch_embedding")
    for row, (channel, sign) in enumerate([(0, 1), (2, 1), (0, -1), (2, -1)]):
        patches.weight[row, channel] = sign / PATCH_SIDE**2
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    # gelu(x) - gelu(-x) = x, so the projector is linear.
    for colour, shown in enumerate(SHOWN_DIMS):
        first.weight[2 * colour, colour], first.weight[2 * colour + 1, colour] = 1, -1
        second.weight[shown, 2 * colour], second.weight[shown, 2 * colour + 1] = 1, -1
    second.bias[VISION_DIM] = 1
    second.bias[BALANCE_DIM] = (WIDTH - 3) ** 0.5


def _set_embeddings_and_head(model: LlavaForConditionalGeneration) -> None:
    """Give every token an embedding of norm 4, which RMSNorm in 16 dimensions leaves unchanged, and set the head."""
    embeddings = model.get_input_embeddings().weight
    embeddings[BOS_ID, FIRST_DIM] = 1
    embeddings[FILLER_IDS.start :, TEXT_DIM] = 1
    embeddings[IMAGE_ID, VISION_DIM] = 1
    shown = torch.tensor([[1.0 if colour >> bit & 1 else -1.0 for bit in (0, 1)] for colour in range(len(COLOURS))])
    embeddings[HINT_IDS.start : HINT_IDS.stop, HINT_DIM] = 1
    embeddings[HINT_IDS.start : HINT_IDS.stop, list(SHOWN_DIMS)] = shown
    embeddings[:, BALANCE_DIM] = (WIDTH - embeddings.square().sum(-1)).sqrt()

    head = model.get_output_embeddings().weight
    head[:, TEXT_DIM] = -ANSWER_LOGIT
    head[ANSWER_IDS.start : ANSWER_IDS.stop, TEXT_DIM] = 0
    head[ANSWER_IDS.start : ANSWER_IDS.stop, list(ANSWER_DIMS)] = ANSWER_LOGIT / 2 * shown


def _set_attention(attention: nn.Module, source: int | None, colours: tuple[int, ...]) -> None:
    """Make text attend to the tokens marked by dimension `source`, and all other tokens to the first token.

    Text before any marked token attends to the first token too. Attention copies the `colours` that the attended tokens
    show to the answer dimensions; the first token shows none.
    """
    # The square root of the head's width cancels the scaling of the scores.
    score = ATTENTION_SCORE * WIDTH**0.5
    attention.q_proj.weight[TO_FIRST_DIM, [FIRST_DIM, VISION_DIM, TEXT_DIM]] = 1
    attention.k_proj.weight[TO_FIRST_DIM, FIRST_DIM] = score
    if source is not None:
        attention.q_proj.weight[TO_SOURCE_DIM, TEXT_DIM] = 1
        attention.k_proj.weight[TO_SOURCE_DIM, source] = 2 * score
    for colour in colours:
        attention.v_proj.weight[colour, SHOWN_DIMS[colour]] = 1
        attention.o_proj.weight[ANSWER_DIMS[colour], colour] = 1
