"""``data.mojibake``: text that went through a wrong reading comes back exactly; text that did not stays as it is."""

import pytest
from datasets import Dataset

from jebi.data.mojibake import repair, repaired

MEANT = [
    "안녕하세요, 제비입니다.",
    "don’t “quote” me — café… 100 €",
    "ein Äpfel für Übermut",
    "中文也一样",
    "🙂 fine",
    "Привет, мир",
]


def as_cp1252(text: str) -> str:
    """UTF-8 read as Windows-1252, the five bytes that it leaves open kept as browsers do."""
    return "".join(
        chr(byte) if byte in b"\x81\x8d\x8f\x90\x9d" else bytes([byte]).decode("cp1252") for byte in text.encode()
    )


@pytest.mark.parametrize("text", MEANT)
def test_utf8_read_as_latin1_or_windows_1252(text: str) -> None:
    for damaged in (text.encode().decode("latin-1"), as_cp1252(text)):
        assert damaged != text
        assert repaired(damaged) == text


def test_read_wrongly_twice() -> None:
    assert repaired(as_cp1252(as_cp1252("café"))) == "café"


def test_only_the_damaged_part_is_turned_back() -> None:
    assert (
        repaired("우리는 " + as_cp1252("서울") + "에 살고, «genau» so – ça va.")
        == "우리는 서울에 살고, «genau» so – ça va."
    )


def test_korean_files_of_windows_read_as_latin1() -> None:
    for text in ("안녕하세요 여러분", "“정말로” 그가 말했다"):
        assert repaired(text.encode("cp949").decode("latin-1")) == text


def test_utf8_read_as_cp949_where_it_survives() -> None:
    assert repaired("고래".encode().decode("cp949")) == "고래"


@pytest.mark.parametrize(
    "text",
    [
        *MEANT,
        "",
        "plain ASCII",
        "Été, garçon, señor, naïve, CAFÉ «là»",
        "Beyoncé’… said",
        "점선 ···· 그리고 ±±±±",
        "½ or ¼, 5 °C ± 1 °C",
        "漢字와 한글",
        "São Paulo, NÃO, Ångström, ÅÄÖ",
        "lost \ufffd character",
    ],
)
def test_sound_text_stays(text: str) -> None:
    assert repaired(text) == text


def test_the_packages_of_the_trade_agree() -> None:
    """ftfy, where it is installed, turns the same texts back."""
    ftfy = pytest.importorskip("ftfy")
    for text in MEANT:
        assert ftfy.fix_encoding(as_cp1252(text)) == repaired(as_cp1252(text)) == text


def test_rows_are_repaired_wherever_their_texts_stand_and_counted_once() -> None:
    bad = as_cp1252("café")
    rows = Dataset.from_list(
        [
            {"text": "fine", "messages": [{"role": "user", "content": "fine"}], "number": 1},
            {
                "text": bad,
                "messages": [{"role": "user", "content": bad}, {"role": "assistant", "content": bad}],
                "number": 2,
            },
            {"text": None, "messages": [], "number": 3},
        ]
    )
    mended, count = repair(rows)
    assert count == 1
    assert mended[1] == {
        "text": "café",
        "messages": [{"role": "user", "content": "café"}, {"role": "assistant", "content": "café"}],
        "number": 2,
    }
    assert [mended[n] for n in (0, 2)] == [rows[n] for n in (0, 2)]
    assert repair(mended) == (mended, 0)
