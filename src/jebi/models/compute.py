"""Which arithmetic multiplies by the frozen base: the compute dtype, or 8-bit floats where the user named them.

``compute="fp8"`` changes the mathematics, ``"fp8_backward"`` the gradients alone; so neither is chosen by itself. Where
they cannot be had they are refused, as soon as that is known. The products are `nn.fp8_product`'s.
"""

import torch

from jebi.config import Compute
from jebi.errors import ConfigError
from jebi.kernels import scaled_product
from jebi.models.decoder import Decoder


def require_card(compute: Compute, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse 8-bit floats on this device, or beside this dtype.

    Raises:
        ConfigError: it has no such products; or activations are not bfloat16.
    """
    if not scaled_product.served(device):
        raise ConfigError(
            f"{_setting(compute)} needs a CUDA card of compute capability 9.0 or newer, and this is {_name(device)}: "
            "drop compute."
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"{_setting(compute)} goes with dtype bfloat16, not {str(dtype)[6:]}: drop dtype or compute.")


def require_layers(compute: Compute, decoder: Decoder) -> None:
    """Refuse 8-bit floats where a layer cannot be laid together, whose products would stay as they are.

    Raises:
        ConfigError: a layer has DoRA, adapter dropout or trained weights; or its sizes are none that cards take.
    """
    for number, layer in enumerate(decoder.decoder_layers()):
        if not layer.stackable():
            raise ConfigError(
                f"{_setting(compute)} serves adapters that are low-rank products over a frozen base, and layer "
                f"{number} has DoRA, adapter dropout or trained weights: set use_dora false and lora_dropout 0, or "
                "drop compute."
            )
        for name, linear in layer.projections():
            for size in (linear.in_features, linear.out_features):
                if size % scaled_product.UNIT:
                    raise ConfigError(
                        f"{_setting(compute)} needs sizes that {scaled_product.UNIT} divides, and {name} of layer "
                        f"{number} has {size}: drop compute."
                    )


def _setting(compute: Compute) -> str:
    return f"compute '{compute}' (model.compute in a config file)"


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} with {major}.{minor}"
