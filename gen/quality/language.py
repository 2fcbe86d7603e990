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
FEWEST_FUNCTION_WORDS = 0.1  # share of the words; with fewer a text's language is not known
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
ASCII_WORD = re.compile(r"[a-z]+")  # the same words of an ASCII text in lower case
LANGUAGES = tuple(FUNCTION_WORDS)
# Places in LANGUAGES of those that a word is a function word of.
LANGUAGES_OF = {
    word: tuple(place for place, name in enumerate(LANGUAGES) if word in FUNCTION_WORDS[name])
    for words in FUNCTION_WORDS.values()
    for word in words
}
NO_ASCII_LETTER = {code: None for code in range(128) if not chr(code).isalpha()}


@functools.lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """First word of a letter's Unicode name: LATIN, CYRILLIC, CJK, ..."""
    name = unicodedata.name(character, "UNKNOWN").split()[0]
    return SAME_SCRIPT.get(name, name)


def dominant_script(text: str) -> str | None:
    """The script of most letters, or None where there are too few letters."""
    sample = text[:SAMPLE]
    if sample.isascii():
        return "LATIN" if len(sample.translate(NO_ASCII_LETTER)) >= FEWEST_LETTERS else None
    scripts: Counter[str] = Counter()
    for character, count in Counter(sample).items():
        if character.isalpha():
            scripts[script_of(character)] += count
    return scripts.most_common(1)[0][0] if scripts.total() >= FEWEST_LETTERS else None


def language_shares(text: str) -> list[float]:
    """Share of the words that are function words of each of LANGUAGES; empty for a short text."""
    sample = text[:SAMPLE]
    words = (ASCII_WORD if sample.isascii() else WORD).findall(sample.lower())
    if len(words) < FEWEST_WORDS:
        return []
    counts = [0] * len(LANGUAGES)
    for word in words:
        for place in LANGUAGES_OF.get(word, ()):
            counts[place] += 1
    return [count / len(words) for count in counts]


class SourceLanguage:
    """The language of a document, which its generations are compared with.

    Texts of fewer than 20 words are judged by their script alone; a language that is not listed,
    or code, tables and names without function words, are never called different.
    """

    def __init__(self, source: str) -> None:
        self.script = dominant_script(source)
        shares = language_shares(source)
        self.expected = shares.index(max(shares)) if shares else None
        self.clear = bool(shares) and max(shares) >= FEWEST_FUNCTION_WORDS

    def differs(self, text: str) -> bool:
        """Whether ``text`` is clearly in another script or language."""
        script = dominant_script(text)
        if self.script is None or script is None:
            return False
        if self.script != script:
            return True
        if not self.clear or self.expected is None:
            return False
        shares = language_shares(text)
        if not shares:
            return False
        found = max(shares)
        return found >= FEWEST_FUNCTION_WORDS and found > CLEAR_MARGIN * shares[self.expected]
