"""Repeats among layers are found, and nothing else changes."""

import pytest

from moe_jax.models.grouping import group_layers


@pytest.mark.parametrize(
  ('layers', 'expected'),
  [
    ('', []),
    ('a', [('a', 1)]),
    ('aaaa', [('a', 4)]),
    ('abbb', [('a', 1), ('b', 3)]),
    ('aabcbcb', [('a', 2), ('bc', 2), ('b', 1)]),
    ('abcdabcd', [('abcd', 2)]),
    ('ababab', [('ab', 3)]),
    ('abc', [('a', 1), ('b', 1), ('c', 1)]),
    ('aabaab', [('aab', 2)]),
    ('abcdeabcde', [(x, 1) for x in 'abcdeabcde']),
  ],
)
def test_groups_are_the_longest_repeats_in_order(layers, expected):
  assert [(''.join(pattern), repeats) for pattern, repeats in group_layers(layers)] == expected


@pytest.mark.parametrize('layers', ['abbacabba', 'aaabaaabaaac', 'abababacacac'])
def test_groups_written_out_are_the_layers(layers):
  groups = group_layers(layers)
  assert ''.join(''.join(pattern) * repeats for pattern, repeats in groups) == layers
