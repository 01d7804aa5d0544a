import json

import pytest

from moe_jax.config import DomainConfig
from moe_jax.data.corpus import documents, split_documents
from moe_jax.data.pieces import pieces


def read(source, **kwargs):
  return documents('d', DomainConfig(source=str(source), **kwargs))


def test_plays_are_38_documents():
  texts = read('plays')
  assert len(texts) == 38
  assert sum(len(text.encode()) for text in texts) > 5_000_000


def test_code_is_python_without_generated_files():
  texts = read('code')
  assert any('def grad(' in text for text in texts)
  assert max(map(len, texts)) < 500_000


def test_corpus_reads_jsonl_text_and_folders_in_order(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'z.md').write_text('third')
  (tmp_path / 'a.jsonl').write_text('{"text": "first"}\n\n{"text": "second \\u00e9", "n": 1}\n')
  (tmp_path / 'c.txt').write_text('fourth')
  (tmp_path / 'ignored.bin').write_bytes(b'\xff')
  assert read(tmp_path) == ['first', 'second \u00e9', 'third', 'fourth']
  assert read(tmp_path / 'a.jsonl') == ['first', 'second \u00e9']


def test_corpus_drops_exact_copies_and_blank_documents(tmp_path):
  lines = [json.dumps({'text': text}) for text in ('one', 'two', 'one', ' \n', 'two')]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  assert read(tmp_path / 'a.jsonl') == ['one', 'two']


def test_corpus_cap_takes_whole_documents(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': c * 400}) for c in 'abcd'))
  assert read(tmp_path / 'a.jsonl', max_megabytes=0.001) == ['a' * 400, 'b' * 400]


def test_corpus_cap_cuts_a_first_document_that_is_too_long(tmp_path):
  (tmp_path / 'a.txt').write_text(''.join(f'{i}\n' for i in range(1000)))
  assert sum(map(len, read(tmp_path / 'a.txt', max_megabytes=0.001))) == 1000


def test_single_document_is_cut_at_paragraphs(tmp_path):
  paragraphs = [f'{i} ' + 'word ' * 200 for i in range(100)]
  text = '\n\n'.join(paragraphs)
  (tmp_path / 'a.txt').write_text(text)
  parts = read(tmp_path / 'a.txt')
  assert ''.join(parts) == text
  assert max(map(len, parts)) <= 20_000
  assert all(part.endswith('\n\n') for part in parts[:-1])


@pytest.mark.parametrize(
  'text', ['', 'x', 'a\nb', 'no border at all', '\n\n\n', 'a\n\n  b\n\nc\nd']
)
@pytest.mark.parametrize('limit', [1, 2, 5, 100])
def test_pieces_join_to_the_text_and_keep_the_limit(text, limit):
  parts = pieces(text, limit)
  assert ''.join(parts) == text
  assert max(map(len, parts)) <= limit


def test_split_is_a_partition_near_the_fraction():
  texts = [f'document {i}' for i in range(2000)]
  train, validation = split_documents(texts, 0.1)
  assert sorted(train + validation) == sorted(texts)
  # 200 expected, standard deviation 13.4: five of them
  assert 133 < len(validation) < 267


def test_split_does_not_depend_on_what_else_is_there():
  texts = [f'document {i}' for i in range(500)]
  _, validation = split_documents(texts, 0.1)
  _, of_some = split_documents(texts[::-3], 0.1)
  assert set(of_some) == set(validation) & set(texts[::-3])


@pytest.mark.parametrize('fraction', [1e-9, 0.5, 1 - 1e-9])
def test_split_leaves_no_side_empty(fraction):
  train, validation = split_documents(['a', 'b'], fraction)
  assert len(train) == len(validation) == 1


BROKEN = {
  'json': ('a.jsonl', b'{"text": "fine"}\n{"text": \n', ':2'),
  'no-text': ('a.jsonl', b'{"txt": "x"}\n', ':1'),
  'not-a-string': ('a.jsonl', b'\n\n{"text": 3}\n', ':3'),
  'not-an-object': ('a.jsonl', b'["text"]\n', ':1'),
  'half-surrogate': ('a.jsonl', b'{"text": "\\ud800"}\n', ':1'),
  'jsonl-not-utf8': ('a.jsonl', b'{"text": "\xff"}\n', ':1'),
  'not-utf8': ('a.txt', b'abc\xff', 'byte 3'),
  'empty': ('a.txt', b'', 'holds 0'),
  'one-letter': ('a.txt', b'x', 'holds 1'),
  'kind': ('a.pdf', b'x', 'unknown kind'),
  'empty-folder': ('sub/a.pdf', b'x', 'folder without'),
}


@pytest.mark.parametrize(('name', 'content', 'said'), BROKEN.values(), ids=BROKEN.keys())
def test_corpus_error_is_one_line_that_names_the_place(tmp_path, name, content, said):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content)
  source = path.parent if name.startswith('sub/') else path
  with pytest.raises(ValueError, match=r'^data\.domains\.d\.source=') as e:
    read(source)
  assert str(source) in str(e.value) and said in str(e.value) and '\n' not in str(e.value)


def test_corpus_missing_path_is_one_line():
  with pytest.raises(ValueError, match=r"^data\.domains\.d\.source='no/such' does not exist\. "):
    read('no/such')
