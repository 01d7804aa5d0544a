"""The methods compared: name -> what they set in experiments/configs/balance.py."""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
  'none': {'balance': 'none'},
  'aux 1e-3': {'balance': 'expert_level', 'routing.expert_level.weight': 1e-3},
  'aux 1e-2': {'balance': 'expert_level', 'routing.expert_level.weight': 1e-2},
  'global 1e-2': {'balance': 'global_batch', 'routing.global_batch.weight': 1e-2},
  'loss-free': {'balance': 'loss_free', 'routing.loss_free.rate': 1e-3},
  'loss-free 3e-3': {'balance': 'loss_free', 'routing.loss_free.rate': 3e-3},
  'loss-free 1e-2': {'balance': 'loss_free', 'routing.loss_free.rate': 1e-2},
  'loss-free decay': {
    'balance': 'loss_free',
    'routing.loss_free.rate': 1e-2,
    'routing.loss_free.decay_from': 0.6,
  },
  'proportional': {
    'balance': 'loss_free',
    'routing.loss_free.rule': 'proportional',
    'routing.loss_free.rate': 1e-2,
  },
  'SMEBU': {'balance': 'smebu', 'routing.smebu.rate': 1e-2},
  'quantile': {'balance': 'quantile'},
  'SimBal': {'balance': 'simbal'},
  'ReLU': {'balance': 'relu', 'routing.relu.lambda_start': 1e-5},
  'Sinkhorn': {'balance': 'sinkhorn'},
  'expert choice': {'balance': 'expert_choice'},
  'hash': {'balance': 'hash'},
  'default expert': {'balance': 'default_expert'},
  'phi': {'balance': 'phi'},
}


def seeds(text: str) -> list[int]:
  """Of a flag: 0,1,2."""
  return [int(seed) for seed in text.split(',')]
