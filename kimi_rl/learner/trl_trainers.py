"""TRL's trainers, imported without TRL's own vLLM client.

Where vLLM is installed, TRL imports it whole for a client that the rollout pool takes the place of.
"""

from trl import import_utils

_is_vllm_available = import_utils.is_vllm_available
import_utils.is_vllm_available = lambda min_version=None: False
try:
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head
finally:
    import_utils.is_vllm_available = _is_vllm_available

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer", "add_fused_lm_head"]
