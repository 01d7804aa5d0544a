import json

import numpy as np
import pytest
import tokenizers

from moe_jax.config import DomainConfig
from moe_jax.data import load_tokenizer
from moe_jax.data.corpus import documents

TEXTS = {
  'prose': 'To be, or not to be: that is the question.',
  'code': 'def f(x):\n    if x:\n\treturn  {"a": [1, 2,   3]}\n\n\n    return None  # done\n',
  'unicode': 'na\u00efve \u4f60\u597d\u3001 \u05e9\u05dc\u05d5\u05dd \U0001f600 e\u0301 1\u00bd',
  'controls': 'a\r\nb\x00c\x1fd\u00a0e\ufeff\ufffd \t\n \n  end  ',
  'specials': 'x<\uff5cend\u2581of\u2581sentence\uff5c>y<|endoftext|>z',
  'long': ''.join(f'line {i}:\n    indented {i * i}\n\n' for i in range(2000)),
  'empty': '',
}


@pytest.fixture(scope='module', params=['bytes', 'deepseek:259', 'deepseek:4096'])
def tokenizer(request):
  return load_tokenizer(request.param)


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS.keys())
def test_tokenizer_round_trip_is_lossless(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS.keys())
def test_tokenizer_byte_lengths_sum_to_the_text(tokenizer, text):
  assert tokenizer.byte_lengths_V[tokenizer.encode(text)].sum() == len(text.encode())


def test_tokenizer_text_cannot_spell_the_document_separator(tokenizer):
  assert tokenizer.eos_id not in tokenizer.encode(TEXTS['specials'])
  assert tokenizer.byte_lengths_V[tokenizer.eos_id] == 0


def test_tokenizer_ids_lie_in_the_vocabulary(tokenizer):
  ids = np.concatenate([tokenizer.encode(text) for text in TEXTS.values()])
  assert tokenizer.byte_lengths_V.shape == (tokenizer.vocab_size,)
  assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_tokenizer_batch_equals_one_by_one(tokenizer):
  texts = list(TEXTS.values())
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope='module')
def full():
  return load_tokenizer('deepseek')


def test_deepseek_has_the_published_size_and_specials(full):
  assert (full.vocab_size, full.eos_id) == (129_280, 1)
  assert full.decode(full.encode(TEXTS['unicode'])) == TEXTS['unicode']


def test_deepseek_cut_keeps_the_meaning_of_every_id(full):
  cut = load_tokenizer('deepseek:4096')
  assert cut.vocab_size == 4096
  ids = range(3, 4096)
  vocab, whole = cut._tokenizer.get_vocab(), full._tokenizer.get_vocab()
  assert vocab == {token: i for token, i in whole.items() if i < 4096}
  np.testing.assert_array_equal(cut.byte_lengths_V[ids], full.byte_lengths_V[ids])


def test_deepseek_encodes_in_parts_as_it_does_whole():
  tokenizer = load_tokenizer('deepseek:4096')
  for source in ('plays', 'code'):
    text = '\n'.join(documents(source, DomainConfig(source=source, max_megabytes=0.3)))
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == whole


def small_tokenizer(folder, eos):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, special_tokens=[eos], show_progress=False
  )
  model.train_from_iterator([TEXTS['long']], trainer)
  path = folder / 'tokenizer.json'
  model.save(str(path))
  return path


def test_tokenizer_json_of_another_model_loads(tmp_path):
  tokenizer = load_tokenizer(str(small_tokenizer(tmp_path, '<|endoftext|>')))
  assert tokenizer.decode(tokenizer.encode(TEXTS['unicode'])) == TEXTS['unicode']
  assert tokenizer.eos_id == 0
  assert tokenizer.byte_lengths_V[tokenizer.encode(TEXTS['code'])].sum() == len(TEXTS['code'])


@pytest.mark.parametrize(
  'spec', ['deepseek:', 'deepseek:12', 'deepseek:200000', 'deepseek:4k', 'gpt2', 'no/such.json']
)
def test_tokenizer_unknown_spec_is_one_line(spec):
  with pytest.raises(ValueError, match=r'^data\.tokenizer=') as e:
    load_tokenizer(spec)
  assert repr(spec) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('content', ['{', '[]', '{}', json.dumps({'added_tokens': []}), '\xff'])
def test_tokenizer_malformed_file_is_one_line(tmp_path, content):
  path = tmp_path / 'tokenizer.json'
  path.write_text(content, encoding='latin-1')
  with pytest.raises(ValueError, match=r'^data\.tokenizer=.*not a usable') as e:
    load_tokenizer(str(path))
  assert '\n' not in str(e.value)


def test_tokenizer_file_without_a_separator_is_refused(tmp_path):
  with pytest.raises(ValueError, match='none of its added tokens'):
    load_tokenizer(str(small_tokenizer(tmp_path, '<mask>')))
