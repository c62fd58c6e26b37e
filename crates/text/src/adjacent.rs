//! Pairs of characters that may be adjacent in a match of a regular expression.
//!
//! The expression is over-approximated by the language it would have without its lookaheads: what is said never to
//! be adjacent never is. Only one lookahead is known, `(?!\S)`; an expression with any other, with an anchor, or with
//! what cannot be read is not analysed at all.

use regex_syntax::hir::{Class, ClassUnicode, Hir, HirKind};

/// The one lookahead that pre-tokenizers use: not before a character that is no space.
const BEFORE_SPACE: &str = r"(?!\S)";
/// Stands for that lookahead. No text has this character.
const MARK: char = '\u{10FFFF}';

/// Marks of Chinese and Japanese that end a word.
const MARKS: [char; 3] = ['，', '。', '、'];
/// Letters written without spaces between words: kana, the common ideographs, and Hangul.
const IDEOGRAPHS: [(char, char); 4] =
    [('\u{3041}', '\u{3096}'), ('\u{30A1}', '\u{30FA}'), ('\u{4E00}', '\u{9FA5}'), ('\u{AC00}', '\u{D7A3}')];
/// Everything beyond ASCII that is no space, and does not stand for one.
const FOREIGN: [(char, char); 10] = [
    ('\u{A1}', '\u{167F}'),
    ('\u{1681}', '\u{1FFF}'),
    ('\u{200B}', '\u{2027}'),
    ('\u{202A}', '\u{202E}'),
    ('\u{2030}', '\u{205E}'),
    ('\u{2060}', '\u{2580}'),
    ('\u{2582}', '\u{2FFF}'),
    ('\u{3001}', '\u{D7FF}'),
    ('\u{E000}', '\u{10FFFE}'),
    ('\u{80}', '\u{84}'),
];

/// A class of characters: each of ASCII by itself, the rest in groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Symbol(u8);

impl Symbol {
    const IDEOGRAPH: Self = Self(128);
    const FOREIGN: Self = Self(129);
    const FIRST_MARK: u8 = 130;
    const LOOKAHEAD: Self = Self(133);
    /// All of them are below.
    pub(crate) const COUNT: usize = 134;

    /// Of the first of two adjacent characters. `None` for spaces beyond ASCII.
    pub(crate) fn before(c: char) -> Option<Self> {
        let within = |ranges: &[(char, char)]| ranges.iter().any(|&(low, high)| low <= c && c <= high);
        match c {
            // Below 128.
            _ if c.is_ascii() => Some(Self(c as u8)),
            _ if within(&IDEOGRAPHS) => Some(Self::IDEOGRAPH),
            _ if within(&FOREIGN) => Some(Self::FOREIGN),
            _ => None,
        }
    }

    /// Of the second. `None` where a group would be too coarse.
    pub(crate) fn after(c: char) -> Option<Self> {
        match MARKS.iter().position(|&mark| mark == c) {
            _ if c.is_ascii() => Some(Self(c as u8)),
            // Of three.
            Some(at) => Some(Self(Self::FIRST_MARK + at as u8)),
            None => None,
        }
    }

    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// The character, where it is one of ASCII.
    pub(crate) fn ascii(self) -> Option<u8> {
        (self.0 < 128).then_some(self.0)
    }

    pub(crate) const fn is_foreign(self) -> bool {
        self.0 >= 128
    }
}

/// A set of symbols.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Symbols(u128, u8);

impl Symbols {
    pub(crate) const NONE: Self = Self(0, 0);

    pub(crate) fn has(self, symbol: Symbol) -> bool {
        match symbol.0 {
            low @ 0..128 => self.0 >> low & 1 == 1,
            high => self.1 >> (high - 128) & 1 == 1,
        }
    }

    pub(crate) fn insert(&mut self, symbol: Symbol) {
        match symbol.0 {
            low @ 0..128 => self.0 |= 1 << low,
            high => self.1 |= 1 << (high - 128),
        }
    }

    pub(crate) fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
        self.1 &= !other.1;
    }

    pub(crate) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0, self.1 | other.1)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0, self.1 & other.1)
    }

    fn of(class: &ClassUnicode) -> Self {
        let meets =
            |low: char, high: char| class.ranges().iter().any(|r| r.start() <= high && low <= r.end());
        let mut set = Self::NONE;
        (0..128u8).filter(|&c| meets(c.into(), c.into())).for_each(|c| set.insert(Symbol(c)));
        for (ranges, symbol) in [(&IDEOGRAPHS[..], Symbol::IDEOGRAPH), (&FOREIGN, Symbol::FOREIGN)] {
            if ranges.iter().any(|&(low, high)| meets(low, high)) {
                set.insert(symbol);
            }
        }
        MARKS
            .iter()
            .filter(|&&mark| meets(mark, mark))
            .filter_map(|&mark| Symbol::after(mark))
            .for_each(|s| set.insert(s));
        if meets(MARK, MARK) {
            set.insert(Symbol::LOOKAHEAD);
        }
        set
    }
}

/// For each symbol those of a kind that go with it.
pub(crate) type Table = [Symbols; Symbol::COUNT];

/// Analysis of an expression.
pub(crate) struct Adjacency {
    /// What may follow a character within a match.
    pairs: Table,
    /// After which characters the lookahead may be asked.
    looks: Table,
    /// Characters at which there is always a match.
    always: Symbols,
}

impl Adjacency {
    /// Reads an expression; `None` where it cannot be analysed.
    pub(crate) fn of(pattern: &str) -> Option<Self> {
        let read = |lookahead: &str| {
            let hir = regex_syntax::parse(&pattern.replace(BEFORE_SPACE, lookahead)).ok()?;
            let mut pairs = [Symbols::NONE; Symbol::COUNT];
            let shape = Shape::of(&hir, &mut pairs)?;
            Some((pairs, shape))
        };
        let (pairs, _) = read("")?;
        // As a character, so that what needs the lookahead does not count as matching without.
        let (looks, shape) = read(&MARK.to_string())?;
        Some(Self { pairs, looks, always: shape.one })
    }

    /// Whether no match goes over the border between these two, and none on either side of it depends on what is
    /// beyond.
    pub(crate) fn parts(&self, before: Symbol, after: Symbol) -> bool {
        let is_space = after.ascii().is_some_and(|c| c.is_ascii_whitespace());
        // Before a space the lookahead answers what it answers at the end of the text.
        !self.pairs[before.index()].has(after)
            && (is_space || !self.looks[before.index()].has(Symbol::LOOKAHEAD))
    }

    /// Whether, wherever this character begins something, a match does begin with it: it is never left over in one piece with
    /// what stands before it.
    pub(crate) fn begins_match(&self, after: Symbol) -> bool {
        self.always.has(after)
    }
}

/// What an analysis needs to know of a part of an expression.
#[derive(Clone, Copy)]
struct Shape {
    is_nullable: bool,
    /// Nullable whatever stands beside it: not by giving back what a possessive quantifier keeps.
    may_be_left_out: bool,
    first: Symbols,
    last: Symbols,
    /// Characters that are a match by themselves.
    one: Symbols,
}

impl Shape {
    const EMPTY: Self = Self {
        is_nullable: true,
        may_be_left_out: true,
        first: Symbols::NONE,
        last: Symbols::NONE,
        one: Symbols::NONE,
    };

    fn class(set: Symbols) -> Self {
        Self { is_nullable: false, may_be_left_out: false, first: set, last: set, one: set }
    }

    fn of(hir: &Hir, pairs: &mut Table) -> Option<Self> {
        match hir.kind() {
            HirKind::Empty => Some(Self::EMPTY),
            HirKind::Literal(literal) => {
                let text = std::str::from_utf8(&literal.0).ok()?;
                let class = |c| {
                    Self::class(Symbols::of(&ClassUnicode::new([regex_syntax::hir::ClassUnicodeRange::new(
                        c, c,
                    )])))
                };
                Some(text.chars().fold(Self::EMPTY, |before, c| before.then(class(c), pairs)))
            }
            HirKind::Class(Class::Unicode(class)) => Some(Self::class(Symbols::of(class))),
            HirKind::Class(Class::Bytes(_)) | HirKind::Look(_) => None,
            HirKind::Repetition(repetition) => {
                let sub = Self::of(&repetition.sub, pairs)?;
                if repetition.max.is_none_or(|max| max > 1) {
                    adjoin(sub.last, sub.first, pairs);
                }
                // `a?+` and `a++` come as a repetition of a repetition.
                let is_plain = !matches!(repetition.sub.kind(), HirKind::Repetition(_));
                Some(Self {
                    is_nullable: repetition.min == 0 || sub.is_nullable,
                    may_be_left_out: is_plain && (repetition.min == 0 || sub.may_be_left_out),
                    one: if is_plain && repetition.min <= 1 { sub.one } else { Symbols::NONE },
                    ..sub
                })
            }
            HirKind::Capture(capture) => Self::of(&capture.sub, pairs),
            HirKind::Concat(parts) => parts
                .iter()
                .try_fold(Self::EMPTY, |before, part| Some(before.then(Self::of(part, pairs)?, pairs))),
            HirKind::Alternation(branches) => {
                let mut branches = branches.iter().map(|branch| Self::of(branch, pairs));
                let first = branches.next()??;
                branches.try_fold(first, |shape, branch| Some(shape.or(branch?)))
            }
        }
    }

    fn then(self, next: Self, pairs: &mut Table) -> Self {
        adjoin(self.last, next.first, pairs);
        let only = |condition: bool, set: Symbols| if condition { set } else { Symbols::NONE };
        Self {
            is_nullable: self.is_nullable && next.is_nullable,
            may_be_left_out: self.may_be_left_out && next.may_be_left_out,
            first: self.first.or(only(self.is_nullable, next.first)),
            last: next.last.or(only(next.is_nullable, self.last)),
            one: only(next.may_be_left_out, self.one).or(only(self.may_be_left_out, next.one)),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            is_nullable: self.is_nullable || other.is_nullable,
            may_be_left_out: self.may_be_left_out || other.may_be_left_out,
            first: self.first.or(other.first),
            last: self.last.or(other.last),
            one: self.one.or(other.one),
        }
    }
}

fn adjoin(last: Symbols, first: Symbols, pairs: &mut Table) {
    for symbol in Symbol::all().filter(|&symbol| last.has(symbol)) {
        pairs[symbol.index()] = pairs[symbol.index()].or(first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    fn before(c: char) -> Symbol {
        Symbol::before(c).unwrap()
    }

    fn after(c: char) -> Symbol {
        Symbol::after(c).unwrap()
    }

    #[test]
    fn words_end_where_a_pattern_ends_them() {
        let gpt2 = Adjacency::of(GPT2).unwrap();
        for (x, y, parts) in [
            ('a', ' ', true),
            ('é', ' ', true),
            ('.', ' ', true),
            ('a', '.', true),
            ('漢', '。', true),
            ('a', '\n', true),
            (' ', 'a', false),
            (' ', ' ', false),
            // Whether the line break is one with what follows, the lookahead decides.
            ('\n', '.', false),
            ('.', '.', false),
            ('\'', 's', false),
        ] {
            assert_eq!(gpt2.parts(before(x), after(y)), parts, "{x:?} {y:?}");
        }
        assert!([' ', '\n', '.', '。', 'a', '7'].into_iter().all(|c| gpt2.begins_match(after(c))));
    }

    #[test]
    fn what_is_left_over_is_no_border() {
        let digits = Adjacency::of(r"\p{N}{1,3}").unwrap();
        assert!(digits.parts(before('a'), after(' ')) && !digits.begins_match(after(' ')));
        let needs = Adjacency::of(r"\s+(?!\S)").unwrap();
        assert!(!needs.begins_match(after(' ')), "a space before a letter is left over");
        let possessive = Adjacency::of(r" ?+\s").unwrap();
        assert!(!possessive.begins_match(after(' ')), "the optional space keeps what the other needs");
    }

    #[test]
    fn what_cannot_be_analysed_is_not() {
        for pattern in [r"(?<=a)b", r"\bword\b", "^a", "(?=x)y", r"(a)\1", "(?>a)b", "("] {
            assert!(Adjacency::of(pattern).is_none(), "{pattern}");
        }
    }
}
