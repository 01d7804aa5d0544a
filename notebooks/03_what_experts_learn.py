# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. What experts learn
#
# The run of notebook 1 has seen plays and Python code in equal parts, and nobody told its experts
# which is which. Every evaluation leaves counts in `routing/`: how many tokens of each domain chose
# each expert, which experts were chosen together, and the choices of the first thousand tokens.

# %%
import json

import numpy as np
import pandas as pd

from experiments.notebook import program, runs, show
from moe_jax import config_io
from moe_jax.analysis import specialisation
from moe_jax.data import RowSource
from moe_jax.train.metrics import first_moe_layer, read_metrics
from moe_jax.train.routing_record import Routing, saved_steps

workdir = runs() / 'small'
# says that nothing is left to do where notebook 1 has run before
program(
  'experiments.run', '--config=experiments/configs/small.py', f'--workdir={workdir}', show_lines=3
)

# %%
config = json.loads((workdir / 'config.json').read_text())
cfg = config_io.build(config)
metrics, first_layer = read_metrics(workdir), first_moe_layer(config)
domains = sorted(cfg.data.domains)
steps = saved_steps(workdir)
routing = Routing.load(workdir, steps[-1])
for name in ('load_LGE', 'pairs_LEE', 'chosen_LTK'):
  print(f'{name:12}', getattr(routing, name).shape)
print('evaluations at steps', *steps)

# %% [markdown]
# ## Domains
#
# Red experts work mostly for one domain, blue ones for the other, white ones for both alike.

# %%
show(specialisation.domain_figure(routing.load_LGE, domains, first_layer=first_layer))

# %% [markdown]
# ## When it comes about
#
# Mutual information is 0 where both domains use the experts alike, and 1 bit where a choice gives
# the domain away. To the right, router saturation (OLMoE, arXiv:2409.02060): of the choices for the
# same tokens, the share that is as it was one evaluation before.

# %%
show(specialisation.growth_figure(metrics, first_layer=first_layer))

# %% [markdown]
# ## Which experts work together
#
# A token visits two experts. Red pairs are chosen together more often than their loads explain.

# %%
top_k = cfg.model.moe.top_k
show(specialisation.coactivation_figure(routing.pairs_LEE, top_k=top_k, first_layer=first_layer))

# %% [markdown]
# ## Tokens
#
# The tokens that prefer an expert, for the experts of the first layer that are most
# concentrated. They are pieces of words, spaces and newlines, as the tokenizer has them.

# %%
source = RowSource(cfg.data, seed=cfg.seed, split='validation')
num_rows = routing.chosen_LTK.shape[1] // cfg.data.sequence_length
read = [source.row(g) for g in range(num_rows)]
token_T = np.concatenate([row['tokens'] for row in read])
domain_T = np.repeat([int(row['domain']) for row in read], cfg.data.sequence_length)
num_experts = cfg.model.moe.num_experts


def favourites(layer: int) -> pd.DataFrame:
  rows = specialisation.favourite_tokens(
    routing.chosen_LTK,
    token_T,
    layer=layer,
    num_experts=num_experts,
    decode=lambda token: source.tokenizer.decode([token]),
  )
  columns = ['expert', 'its favourite tokens', 'their share of its choices']
  return pd.DataFrame(rows, columns=columns).set_index('expert').round(2)


favourites(0).head(8)

# %% [markdown]
# And of the last layer:

# %%
favourites(cfg.model.num_layers - first_layer - 1).head(8)

# %% [markdown]
# ## Token or domain, layer by layer

# %%
show(
  specialisation.information_figure(
    routing.chosen_LTK, token_T, domain_T, num_experts=num_experts, first_layer=first_layer
  )
)
