"""Rules against published examples, and against plain loops over characters."""

import random
import unicodedata

import pytest

from gptpl.errors import InputError
from gptpl.filters import Patterns, PersonalData, Rule, WordList
from gptpl.filters.rules import iban_is_right, luhn_is_right

CARDS = (
    # Test numbers that payment services publish.
    *("4111111111111111", "4242424242424242", "4012888888881881", "4222222222222", "5555555555554444"),
    *("5105105105105100", "2223003122003222", "2720994326581252", "378282246310005", "371449635398431"),
    *("6011111111111117", "6011000990139424", "30569309025904", "38520000023237", "3530111333300000"),
    *("3566002020360505", "6200000000000005"),
)
IBANS = (
    # Examples of SWIFT's IBAN registry.
    *("AD12 0001 2030 2003 5910 0100", "AE07 0331 2345 6789 0123 456", "AT61 1904 3002 3457 3201"),
    *("BE68 5390 0754 7034", "BR18 0036 0305 0000 1000 9795 493C 1", "CH93 0076 2011 6238 5295 7"),
    *("DE89 3704 0044 0532 0130 00", "ES91 2100 0418 4502 0005 1332", "FR14 2004 1010 0505 0001 3M02 606"),
    *(
        "GB29 NWBK 6016 1331 9268 19",
        "IT60 X054 2811 1010 0000 0123 456",
        "MT84 MALT 0110 0001 2345 MTLC AST0 01S",
    ),
    *("NL91 ABNA 0417 1643 00", "NO93 8601 1117 947", "SA03 8000 0000 6080 1016 7519"),
    *("SE45 5000 0000 0583 9825 7466", "LC55 HEMM 0001 0001 0012 0012 0002 3015"),
)


def found(rule: Rule, text: str) -> list[tuple[str, str]]:
    return [(each.rule, text[each.start : each.end]) for each in rule.verdict(text).findings]


# --- personal data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CARDS)
def test_card_numbers_are_found_and_others_are_not(number):
    rule = PersonalData(kinds=["card number"])
    assert found(rule, f"Card {number}, valid.") == [("card number", number)]
    grouped = " ".join(number[i : i + 4] for i in range(0, len(number), 4))
    if len(number) == 16:
        for written in (grouped, grouped.replace(" ", "-"), grouped.replace(" ", "\u00a0")):
            assert found(rule, f"3 {written} 17") == [("card number", written)]
    for place in range(len(number)):  # Luhn's digit tells every single wrong one
        wrong = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert found(rule, wrong) == []
    assert found(rule, f"x{number} {number}x 1.{number}") == []


def test_luhn_is_the_sum_of_its_definition():
    draw = random.Random(1)
    right = 0
    for _ in range(300):
        digits = "".join(draw.choices("0123456789", k=draw.randrange(12, 20)))
        total = 0
        for i in range(len(digits)):
            digit = int(digits[-1 - i])
            if i % 2:
                digit = digit * 2 if digit < 5 else digit * 2 - 9
            total += digit
        assert luhn_is_right(digits) == (total % 10 == 0)
        right += total % 10 == 0
    assert right > 10


@pytest.mark.parametrize("iban", IBANS)
def test_ibans_are_found_and_others_are_not(iban):
    rule, plain = PersonalData(kinds=["IBAN"]), iban.replace(" ", "")
    for written in (iban, plain, plain.lower(), iban.replace(" ", "\u202f")):
        assert found(rule, f"TO {written} AND ON") == [("IBAN", written)]
    assert found(rule, f"TO {iban}\nAND") == [("IBAN", iban)]
    swapped = plain[:2] + plain[3] + plain[2] + plain[4:]
    if swapped != plain:
        assert found(rule, swapped) == []
    assert found(rule, plain[:-1]) == found(rule, f"{plain}0") == found(rule, f"A{plain}") == []
    assert found(rule, iban[:9] + " " + iban[9:]) == []
    assert iban_is_right(plain)


PHONES = (
    *("+44 20 7946 0958", "+44 (0)20 7946 0958", "+442079460958", "+49 30 1234 5678", "+1-555-123-4567"),
    *("(555) 123-4567", "555-123-4567", "555.123.4567", "08712300220", "0871-872-9758", "0800 0839402"),
    *("0044 20 7946 0958", "+352 26 123"),
)
NO_PHONES = (
    *("2024-01-02 03:04", "01.02.2024 12:30", "01-02-2024", "12345678901", "0123", "1,000,000,000", "12 34"),
    *("0.123456789", "a0871230022", "08712300220x", "5551234567"),
    *("J. Chem. Phys. (1998) 120 1234-1240", "ISBN 0-306-40615-2", "01-02-2023 05-06-2024"),
    *("0 1 2 3 4 5 6 7 8 9 10", "(1914-1918) 1939"),
)


@pytest.mark.parametrize("number", PHONES)
def test_phone_numbers_are_found(number):
    rule = PersonalData(kinds=["phone number"])
    for text in (number, f"Call {number} now", f"Call {number}.", f"tel:{number}, or not", f"{number}\n5"):
        assert found(rule, text) == [("phone number", number)], text


def test_phone_numbers_in_a_row_are_several():
    rule = PersonalData(kinds=["phone number"])
    assert [each for _, each in found(rule, "08712300220 08712300221 0871 872 9758 0871 872 9759")] == [
        *("08712300220", "08712300221", "0871 872 9758", "0871 872 9759")
    ]
    assert found(rule, "08712300220 150 now") == [("phone number", "08712300220")]


@pytest.mark.parametrize("text", NO_PHONES)
def test_other_numbers_are_no_phone_numbers(text):
    assert found(PersonalData(kinds=["phone number"]), text) == []


@pytest.mark.parametrize(
    "address",
    [
        "jo@example.org",
        "Jo.O'Neil+tag@mail.example.co.uk",
        "j_o%x@a-b.museum",
        "j\u00fcrgen@b\u00fccher.example",
    ],
)
def test_email_addresses_are_found(address):
    for text in (address, f"<{address}>", f"Mail {address}.", f"({address}),", f"mailto:{address}?x"):
        assert found(PersonalData(), text) == [("e-mail address", address)]


@pytest.mark.parametrize("text", ["@jo", "jo@", "jo@example", "jo @example.org", "a@b", "at@@example.org"])
def test_other_texts_are_no_email_addresses(text):
    assert found(PersonalData(), text) == []


def test_ip_addresses_have_four_bytes():
    rule = PersonalData(kinds=["IP address"])
    numbers = [0, 1, 9, 10, 99, 100, 199, 200, 249, 250, 255]
    for number in numbers:
        address = f"10.{number}.{number}.{number}"
        assert found(rule, f"at {address}.") == [("IP address", address)]
    for text in ("256.1.1.1", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4a", "v1.2.3.4"):
        assert found(rule, text) == [], text


def test_a_number_is_of_one_kind_alone():
    iban = "DE89 3704 0044 0532 0130 00"  # 0044 0532 0130 00 looks like a phone number
    assert found(PersonalData(), iban) == [("IBAN", iban)]
    assert found(PersonalData(kinds=["phone number"]), iban) == []


def judge(rule: Rule, text: str, *, cut: int) -> None:
    stream = rule.stream()
    for start in range(0, len(text), cut):
        stream.feed(text[start : start + cut])
    stream.finish()


@pytest.mark.timeout(60)  # an expression that tries again at every character would take many minutes
@pytest.mark.parametrize("unit", ["a", "1 ", "+1", "a@b-", "(0", "a@b.cc,", "1.2.3.4,", "\n", "abc019@."])
def test_a_long_text_is_judged_in_one_pass(unit):
    judge(PersonalData(), unit * (100_000 // len(unit)), cut=10**6)
    judge(WordList(words=["damn"]), ("a" + "\u0301" * 500 + unit) * (10_000 // 501), cut=10**6)


@pytest.mark.parametrize(
    ("rule", "units"),
    [
        *(
            (PersonalData(), units)
            for units in (["1 "], ["1) "], ["12 34 "], ["\n"], ["a@b.cc,", "1.2.3.4,"])
        ),
        (PersonalData(), list("abcdefghijklmnopqrstuvwxyz0123456789@.")),
        (WordList(words=["damn"]), ["damn "]),
    ],
)
def test_what_a_stream_reads_grows_as_the_text(rule, units, monkeypatch):
    read = 0
    find, part_end = type(rule).find, type(rule).part_end

    def counted_find(self, part):
        nonlocal read
        read += len(part)
        return find(self, part)

    def counted_part_end(self, text, start):
        nonlocal read
        read += len(text) - start
        return part_end(self, text, start)

    monkeypatch.setattr(type(rule), "find", counted_find)
    monkeypatch.setattr(type(rule), "part_end", counted_part_end)
    characters = []
    lengths = (10_000, 40_000)
    for length in lengths:
        read = 0
        judge(rule, "".join(random.Random(0).choices(units, k=length))[:length], cut=15)
        characters.append(read)
    assert characters[0] > lengths[0]
    assert characters[1] < 6 * characters[0]  # the square would be 16 times


@pytest.mark.parametrize("cut", [1, 50, 10**6])
def test_a_long_text_without_blanks_has_the_findings_of_its_parts(cut):
    entries = [f'"m{n}@example.org":"10.0.{n // 250}.{n % 250}","+33123{n:07}"' for n in range(500)]
    stream = PersonalData().stream()
    text = ";".join(entries)
    shown = [stream.feed(text[at : at + cut]) for at in range(0, len(text), cut)]
    assert len(text) > 20_000
    wanted = '"[e-mail address]":"[IP address]","[phone number]"'
    assert "".join([*shown, stream.finish()]) == ";".join([wanted] * 500)
    assert max(map(len, shown)) < 6000 or cut > 6000


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="has no 'email': did you mean e-mail address"):
        PersonalData(kinds=["email"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="list of one or more"):
        PersonalData(kinds=[])


# --- words ----------------------------------------------------------------------------------------------


def test_whole_words_are_found():
    rule = WordList(words=["ham", "e-mail", "don't", "c++", "Stra\u00dfe"])
    text = "Ham hams, HAM-let e-mail E-mails don't: C++ c++11 STRASSE ham_ shame"
    assert [each for _, each in found(rule, text)] == [
        *("Ham", "HAM", "e-mail", "don't", "C++", "STRASSE", "ham")
    ]
    assert found(WordList(words=["e", "e-mail"]), "e-mail e-mails") == [("word", "e-mail"), ("word", "e")]


def test_words_are_equal_whose_normal_forms_are():
    """The oracle: NFKC of the whole word, case-folded, without invisible characters."""

    def form(word: str) -> str:
        visible = "".join(each for each in word if unicodedata.category(each) != "Cf")
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())

    words = [
        *(
            "na\u00efve",
            "nai\u0308ve",
            "naive",
            "\uff4eaive",
            "NAI\u0308VE",
            "na\u00adive",
            "\ufb01n",
            "fin",
            "Fin",
        ),
        *(
            "\ud55c",
            "\u1112\u1161\u11ab",
            "a\u0323\u0302",
            "a\u0302\u0323",
            "\u1ead",
            "\u00e2",
            "\u03a3\u03c2",
        ),
        *("\u03c3\u03c3", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f", "\u2168", "ix"),
    ]
    for listed in words:
        rule = WordList(words=[listed])
        for word in words:
            expected = [("word", word)] if form(listed) == form(word) else []
            assert found(rule, f"({word})") == expected, (listed, word)


def test_a_file_has_a_word_on_each_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffham\r\n\r\n  spam \n", encoding="utf-8")
    assert [each for _, each in found(WordList(path=path, words=["egg"]), "Spam, ham, egg.")] == [
        *("Spam", "ham", "egg")
    ]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        WordList(path=path)
    path.write_text("\n \n")
    with pytest.raises(InputError, match="word list is empty"):
        WordList(path=path)
    with pytest.raises(InputError, match=r"cannot be read: No such file.*nothing\.txt"):
        WordList(path=tmp_path / "nothing.txt")


@pytest.mark.parametrize("word", ["two words", "-x", "", "\u00ad", "$$$"])
def test_what_is_no_word_is_refused(word):
    with pytest.raises(InputError, match=r"is not a word.*filter=patterns"):
        WordList(words=["ham", word])


# --- patterns -------------------------------------------------------------------------------------------


def test_patterns_read_a_unit_at_a_time():
    text = "order 12-34\nand 56\n78"
    numbers = {"number": r"\d+-\d+", "two": r"\d+\s\d+", "last": r"\d$"}
    assert [rule for rule, _ in found(Patterns(patterns=numbers), text)] == ["number", "last", "last", "last"]
    words = found(Patterns(patterns={"and": "^and$", "both": "and 56"}, unit="word"), text)
    assert words == [("and", "and")]
    assert found(Patterns(patterns=numbers, unit="text"), text) == [
        *(("number", "12-34"), ("two", "56\n78"), ("last", "8"))
    ]


def test_wrong_patterns_are_refused_by_name():
    with pytest.raises(InputError, match=r"patterns\.order=\(\[a is not a regular expression: unterminated"):
        Patterns(patterns={"fine": "a", "order": "([a"})
    with pytest.raises(InputError, match=r"patterns\.any=a\* matches the empty text"):
        Patterns(patterns={"any": "a*"})
    with pytest.raises(InputError, match="patterns is empty"):
        Patterns(patterns={})
    with pytest.raises(InputError, match="unit=page"):
        Patterns(patterns={"a": "a"}, unit="page")  # type: ignore[arg-type]


def test_a_filter_is_another_one_when_its_words_are(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("ham\n")
    before = WordList(path=path).identity
    assert WordList(path=path).identity == before
    path.write_text("ham\nspam\n")
    assert WordList(path=path).identity != before
    assert [found(WordList(words=["damn"]), text) for text in ("_damn_", "__damn__")] == [
        [("word", "damn")],
        [("word", "damn")],
    ]
