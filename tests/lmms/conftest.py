"""What the tests of the lmms-eval model share: a folder of videos, tiny models, and clips."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """HF_HOME, and no network. lmms-eval's tasks read the environment when they are imported."""
    pytest.importorskip("lmms_eval")
    folder = tmp_path_factory.mktemp("hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TQDM_DISABLE"):
            patch.setenv(name, "1")
        for name in ("OPENAI_API_KEY", "OPENAI_API_URL", "API_TYPE", "MODEL_VERSION"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        yield folder


@pytest.fixture(scope="session")
def llava():
    """The tiny LLaVA that ships with the project, and its processor."""
    from experiments.models.build import load_checkpoint

    model, processor = load_checkpoint("asset:tiny")
    return model.eval(), processor


@pytest.fixture(scope="session")
def mini(llava):
    """A LLaVA-Mini whose two pre-fusion layers change the text, and its processor."""
    import torch

    from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

    torch.manual_seed(0)
    model = LlavaMiniForConditionalGeneration.from_llava(
        llava[0], compressor="query", compressor_size=2, prefusion_layers=2
    )
    return model.eval(), LlavaMiniProcessor.from_llava(llava[1], model.config)
