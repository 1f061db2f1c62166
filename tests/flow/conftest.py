import importlib
import sys
import types

import pytest


@pytest.fixture(scope="session")
def bfl_sampling():
    """Black Forest Labs' sampling module, without what it imports only for control images (OpenCV, watermarks)."""
    unused = {
        "fluxbfl.modules.image_embedders": ("CannyImageEncoder", "DepthImageEncoder", "ReduxImageEncoder"),
        "fluxbfl.util": ("PREFERED_KONTEXT_RESOLUTIONS",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, names in unused.items():
            patch.setitem(sys.modules, module, types.SimpleNamespace(**dict.fromkeys(names, object)))
        return importlib.import_module("fluxbfl.sampling")
