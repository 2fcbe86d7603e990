"""Which script and, in a shared script, which language a text is most likely written in.

A heuristic that only has to notice when an answer left its source's language: scripts by their
Unicode names, languages by their most frequent function words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

SAMPLE = 2000  # characters that are looked at
FEWEST_WORDS = 20  # a shorter text is not judged
CLEAR_MARGIN = 1.5  # how much more frequent another language's function words must be
FEWEST_LETTERS = 20
# Scripts that one language mixes freely.
SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "HANGUL", "KATAKANA-HIRAGANA": "CJK"}

# Function words that are frequent in one language and rare or absent in the others.
FUNCTION_WORDS = {
    name: frozenset(words.split())
    for name, words in {
        "Czech": "je se že jako jsou nebo který byl jeho také však aby když ale již při",
        "Danish": "det er af til som ikke med har på den hun blev efter også eller være",
        "Dutch": "het een van niet zijn dat wordt ook maar naar bij deze werd heeft voor aan",
        "English": "the and of to that with for are was this from which have not they been",
        "Finnish": "ja on ei että oli se hän mutta kun niin myös ovat joka sen tai kuin",
        "French": "les des est une dans que pour pas avec sont sur qui aux cette elle ont",
        "German": "der die und das nicht ist ein mit dem den sich auch für eine auf wird",
        "Hungarian": "az hogy nem egy és volt meg csak már mint ez vagy ha még lehet pedig",
        "Indonesian": "yang dan dengan untuk dari pada adalah ini tidak dalam oleh akan itu telah",
        "Italian": "che di il della per non una sono con del gli nel anche alla più questo",
        "Norwegian": "og er som det ikke til på han av den ble også eller etter være fra",
        "Polish": "się nie jest że na jako przez są oraz był które także może lub tym jego",
        "Portuguese": "que não uma para com os em mais dos foi pelo são também ele sua ao",
        "Romanian": "și este nu care pentru din sunt mai fost prin sau această lui fi după între",
        "Spanish": "los las una por con para del más como pero sus está fue este muy son",
        "Swedish": "och att det som är inte till av på den med har från var också eller",
        "Turkish": "bir ve bu için olarak ile daha olan gibi çok sonra kadar ise değil en olduğu",
        "Vietnamese": "và của là các được trong có cho không người một với này những đã để",
        "Bulgarian": "и на се от за да са с по като не че бил един това или",
        "Russian": "и в не на что с он как это по но из у его так был",
        "Ukrainian": "і в не на що з він як це до та його але від було про",
        "Arabic": "في من على أن إلى التي هذا عن ما لا مع كان هذه بعد",
        "Persian": "و در به از که این را با است برای آن یک خود تا",
        "Hindi": "के है में की और से को का एक पर यह नहीं भी हैं",
        "Marathi": "आहे आणि या ते व हे होते नाही तर मध्ये एक होता असे",
    }.items()
}
WORD = re.compile(r"[^\W\d_]+")


@functools.lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """First word of a letter's Unicode name: LATIN, CYRILLIC, CJK, ..."""
    name = unicodedata.name(character, "UNKNOWN").split()[0]
    return SAME_SCRIPT.get(name, name)


def dominant_script(text: str) -> str | None:
    """The script of most letters, or None where there are too few letters."""
    letters = [character for character in text[:SAMPLE] if character.isalpha()]
    if len(letters) < FEWEST_LETTERS:
        return None
    return Counter(script_of(letter) for letter in letters).most_common(1)[0][0]


def language_shares(text: str) -> dict[str, float]:
    """Share of the words that are function words of each language; empty for a short text."""
    words = WORD.findall(text[:SAMPLE].lower())
    if len(words) < FEWEST_WORDS:
        return {}
    return {
        name: sum(word in known for word in words) / len(words)
        for name, known in FUNCTION_WORDS.items()
    }


def other_language(source: str, text: str) -> bool:
    """Whether ``text`` is clearly in another script or language than ``source``.

    Texts of fewer than 20 words are judged by their script alone; a language that is not listed,
    or code, tables and names without function words, are never called different.
    """
    scripts = dominant_script(source), dominant_script(text)
    if None in scripts:
        return False
    if scripts[0] != scripts[1]:
        return True
    of_source, of_text = language_shares(source), language_shares(text)
    if not of_source or not of_text:
        return False
    expected = max(of_source, key=lambda name: of_source[name])
    found = max(of_text, key=lambda name: of_text[name])
    return (
        of_source[expected] >= 0.1
        and of_text[found] >= 0.1
        and of_text[found] > CLEAR_MARGIN * of_text[expected]
    )
