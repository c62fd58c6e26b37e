//! Seams: cuts of a text at which the ids of its parts, one after the other, are the ids of the whole.
//!
//! What must hold: at a seam no added token reaches over it or looks beyond it, the normalizer changes nothing across
//! it, and either every pre-tokenizer keeps to its side and one of them always splits there, or, where words are not
//! split at all, no token of the vocabulary has its two characters side by side, so that nothing merges across.
//! Tokenizers of which this cannot be shown have no seams. Knows nothing of what a part costs.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

use crate::adjacent::{Adjacency, Symbol, Symbols, Table};

/// What `ByteLevel` splits by.
const BYTE_LEVEL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// What a space becomes in vocabularies whose words are not split.
const SPACE: char = '▁';
/// What tokens strip, as far as it is ASCII.
const ASCII_SPACES: [char; 6] = [' ', '\t', '\n', '\u{b}', '\u{c}', '\r'];

/// The seams of one tokenizer's texts.
#[derive(Debug)]
pub(crate) struct Seams {
    /// After which characters a seam may be, and before which.
    at: Box<Table>,
    /// Set where the normalizer puts a space of its own before every text. A seam then takes the place of a space that one of
    /// these characters follows.
    instead_of_space: Option<Symbols>,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part<'a> {
    pub(crate) text: &'a str,
    /// What comes after it; empty at the end.
    pub(crate) rest: &'a str,
}

impl Seams {
    pub(crate) fn of(library: &Tokenizer) -> Self {
        Self::found(library).unwrap_or_else(|| Self { at: table(Symbols::NONE), instead_of_space: None })
    }

    fn found(library: &Tokenizer) -> Option<Self> {
        let json = |value: serde_json::Result<Value>| value.ok();
        let normalizer = match library.get_normalizer() {
            Some(normalizer) => Normal::of(&json(serde_json::to_value(normalizer))?)?,
            None => Normal::default(),
        };
        let splits = match library.get_pre_tokenizer() {
            Some(splitter) => Splits::of(&json(serde_json::to_value(splitter))?)?,
            None => Splits::new(),
        };
        let is_random = matches!(library.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_some());
        if is_random || (splits.any && normalizer.replaces_space) {
            return None;
        }
        let mut at =
            if splits.any { splits.border } else { unmerged(library, &splits, normalizer.replaces_space)? };
        normalizer.restrict(&mut at);
        let added: Vec<&AddedToken> =
            library.get_added_vocabulary().get_added_tokens_decoder().values().collect();
        // They are looked for in the normalized text, in a form that is not known here.
        if normalizer.composes && added.iter().any(|token| token.normalized && !token.content.is_ascii()) {
            return None;
        }
        added.iter().for_each(|token| keep_whole(token, &mut at));
        let instead_of_space = normalizer.prepends.then(|| {
            let firsts = added.iter().filter_map(|token| token.content.chars().next());
            let mut may_follow = Symbols::NONE;
            Symbol::all()
                .filter(|symbol| {
                    symbol.is_foreign() || symbol.ascii().is_some_and(|c| c.is_ascii_alphanumeric())
                })
                .for_each(|symbol| may_follow.insert(symbol));
            firsts.for_each(|first| may_follow.remove(group(first)));
            at.iter_mut().for_each(|row| *row = row.and(only(' ')));
            may_follow
        });
        Some(Self { at, instead_of_space })
    }

    /// The longest beginning of `text` of at most `target` bytes that ends at a seam; where there is none, the shortest that
    /// does; where there is none either, all of it.
    pub(crate) fn first<'a>(&self, text: &'a str, target: usize) -> Part<'a> {
        if text.len() <= target {
            return Part { text, rest: "" };
        }
        let seam = (1..=target).rev().chain(target + 1..text.len()).find(|&at| self.is_seam(text, at));
        let (text, rest) = text.split_at(seam.unwrap_or(text.len()));
        let rest =
            if self.instead_of_space.is_some() { rest.strip_prefix(' ').unwrap_or(rest) } else { rest };
        Part { text, rest }
    }

    fn is_seam(&self, text: &str, at: usize) -> bool {
        let bytes = text.as_bytes();
        // Between two bytes of ASCII, as most are, nothing needs decoding.
        let between = |before: char, after: char| {
            let symbols = Symbol::before(before).zip(Symbol::after(after));
            symbols.is_some_and(|(before, after)| self.at[before.index()].has(after))
        };
        if bytes[at - 1].is_ascii()
            && bytes[at].is_ascii()
            && !between(bytes[at - 1].into(), bytes[at].into())
        {
            return false;
        }
        if !text.is_char_boundary(at) {
            return false;
        }
        let mut follow = text[at..].chars();
        let (before, after) = (text[..at].chars().next_back(), follow.next());
        before.zip(after).is_some_and(|(before, after)| between(before, after))
            && self.instead_of_space.is_none_or(|may_follow| {
                follow.next().and_then(Symbol::before).is_some_and(|next| may_follow.has(next))
            })
    }
}

fn table(row: Symbols) -> Box<Table> {
    Box::new([row; Symbol::COUNT])
}

fn only(c: char) -> Symbols {
    let mut set = Symbols::NONE;
    Symbol::after(c).into_iter().for_each(|symbol| set.insert(symbol));
    set
}

/// All symbols that may stand for `c` as the first of two.
fn group(c: char) -> Symbols {
    let mut set = Symbols::NONE;
    let matching = |symbol: &Symbol| {
        if c.is_ascii() { symbol.ascii() == u8::try_from(c).ok() } else { symbol.is_foreign() }
    };
    Symbol::all().filter(matching).for_each(|symbol| set.insert(symbol));
    set
}

/// Characters before which a seam may be: none of a word, so that nobody who asks for the border of a word is
/// answered otherwise.
fn may_begin_part() -> Symbols {
    let ascii = (0..128u8)
        .map(char::from)
        .filter(|c| matches!(c, ' ' | '\n') || (c.is_ascii_punctuation() && *c != '_'));
    let mut set = Symbols::NONE;
    ascii.chain(['，', '。', '、']).filter_map(Symbol::after).for_each(|symbol| set.insert(symbol));
    set
}

/// What a normalizer does.
#[derive(Debug, Default)]
struct Normal {
    /// It composes or decomposes characters beyond ASCII.
    composes: bool,
    /// It changes more of them than that.
    is_coarse: bool,
    /// Every space becomes [`SPACE`].
    replaces_space: bool,
    /// [`SPACE`] comes before every text.
    prepends: bool,
}

impl Normal {
    /// `None` where it is of another kind.
    fn of(json: &Value) -> Option<Self> {
        let mut normal = Self::default();
        normal.take(json)?;
        // What is put before a text must be what the space that a seam takes out would have become.
        (!normal.prepends || normal.replaces_space).then_some(normal)
    }

    fn take(&mut self, json: &Value) -> Option<()> {
        match json["type"].as_str()? {
            "Sequence" => json["normalizers"].as_array()?.iter().try_for_each(|step| self.take(step)),
            "NFC" => {
                self.composes = true;
                Some(())
            }
            "NFD" | "NFKC" | "NFKD" => {
                (self.composes, self.is_coarse) = (true, true);
                Some(())
            }
            "Replace" if json["pattern"]["String"] == " " && json["content"] == SPACE.to_string() => {
                self.replaces_space = true;
                Some(())
            }
            "Prepend" if json["prepend"] == SPACE.to_string() => {
                self.prepends = true;
                Some(())
            }
            _ => None,
        }
    }

    fn restrict(&self, at: &mut Table) {
        if !self.composes {
            return;
        }
        // What is beyond ASCII may become ASCII: then all of ASCII must part from what follows.
        let visible = Symbol::all().filter(|symbol| symbol.ascii().is_some_and(|c| c.is_ascii_graphic()));
        let all = visible.map(|symbol| at[symbol.index()]).reduce(Symbols::and).unwrap_or_default();
        let ideograph = Symbol::before('漢');
        for symbol in Symbol::all().filter(|symbol| symbol.is_foreign()) {
            let is_stable = Some(symbol) == ideograph && !self.is_coarse;
            if !is_stable {
                at[symbol.index()] = at[symbol.index()].and(all);
            }
            if self.is_coarse {
                ['，', '。', '、'].map(only).into_iter().for_each(|mark| at[symbol.index()].remove(mark));
            }
        }
        if self.is_coarse {
            for row in at.iter_mut() {
                ['，', '。', '、'].map(only).into_iter().for_each(|mark| row.remove(mark));
            }
        }
    }
}

/// What the steps of a pre-tokenizer do at a border between two characters.
struct Splits {
    /// All of them keep to their side.
    parts: Box<Table>,
    /// And one of them splits there.
    border: Box<Table>,
    /// There is a step that splits.
    any: bool,
    /// Nothing may come after it: the text is no longer the text.
    is_last: bool,
}

impl Splits {
    fn new() -> Self {
        Self { parts: table(may_begin_part()), border: table(Symbols::NONE), any: false, is_last: false }
    }

    /// `None` where a step is of another kind.
    fn of(json: &Value) -> Option<Self> {
        let mut splits = Self::new();
        splits.take(json)?;
        for (border, parts) in splits.border.iter_mut().zip(splits.parts.iter()) {
            *border = border.and(*parts);
        }
        Some(splits)
    }

    fn take(&mut self, json: &Value) -> Option<()> {
        if self.is_last {
            return None;
        }
        match json["type"].as_str()? {
            "Sequence" => json["pretokenizers"].as_array()?.iter().try_for_each(|step| self.take(step)),
            "Split" if json["behavior"] == "Isolated" && json["invert"] == false => {
                let pattern = match (json["pattern"]["Regex"].as_str(), json["pattern"]["String"].as_str()) {
                    (Some(regex), _) => regex.to_owned(),
                    (None, Some(text)) => regex_syntax::escape(text),
                    (None, None) => return None,
                };
                self.split_by(&pattern)
            }
            // What they do between two characters follows from these two.
            "Digits" | "Punctuation" => Some(()),
            "ByteLevel" => {
                self.is_last = true;
                if json["add_prefix_space"] != false {
                    self.parts.iter_mut().for_each(|row| *row = row.and(only(' ')));
                }
                if json["use_regex"] == false { Some(()) } else { self.split_by(BYTE_LEVEL) }
            }
            "Metaspace" if json["replacement"] == SPACE.to_string() => {
                self.is_last = true;
                self.parts.iter_mut().for_each(|row| *row = row.and(only(' ')));
                if json["split"] != false {
                    self.any = true;
                    self.border.iter_mut().for_each(|row| *row = row.or(only(' ')));
                }
                Some(())
            }
            _ => None,
        }
    }

    fn split_by(&mut self, pattern: &str) -> Option<()> {
        let adjacency = Adjacency::of(pattern)?;
        self.any = true;
        for before in Symbol::all() {
            let (mut parts, mut border) = (Symbols::NONE, Symbols::NONE);
            for after in Symbol::all().filter(|&after| adjacency.parts(before, after)) {
                parts.insert(after);
                if adjacency.begins_match(after) {
                    border.insert(after);
                }
            }
            let at = before.index();
            self.parts[at] = self.parts[at].and(parts);
            self.border[at] = self.border[at].or(border);
        }
        Some(())
    }
}

/// Borders that no merge crosses, where a text is one word. `None` where tokens are not found by merging alone.
fn unmerged(library: &Tokenizer, splits: &Splits, replaces_space: bool) -> Option<Box<Table>> {
    let ModelWrapper::BPE(bpe) = library.get_model() else { return None };
    let vocab = plain_bpe(bpe)?;
    let space = if replaces_space || splits.is_last { SPACE } else { ' ' };
    let mut at = splits.parts.clone();
    let mut known = Symbols::NONE;
    for token in vocab.keys() {
        let mut chars = token.chars();
        let Some(mut before) = chars.next() else { continue };
        if chars.as_str().is_empty() {
            known = known.or(only(if before == space { ' ' } else { before }));
        }
        for c in chars {
            let after = only(if c == space { ' ' } else { c });
            // The bytes of a character that is not known are spelled like this.
            let before = match std::mem::replace(&mut before, c) {
                '>' => group('>').or(group('漢')),
                other if other == space => group(' '),
                other => group(other),
            };
            Symbol::all()
                .filter(|&symbol| before.has(symbol))
                .for_each(|symbol| at[symbol.index()].remove(after));
        }
    }
    // A character that is not known becomes bytes, which others may merge with.
    at.iter_mut().for_each(|row| *row = row.and(known));
    Some(at)
}

/// The vocabulary of a model whose words are merged from characters and bytes, and from nothing else.
fn plain_bpe(bpe: &BPE) -> Option<HashMap<String, u32>> {
    let is_plain = bpe.get_continuing_subword_prefix().is_none()
        && bpe.end_of_word_suffix.is_none()
        && !bpe.ignore_merges
        && bpe.byte_fallback;
    let vocab = is_plain.then(|| bpe.get_vocab())?;
    (0..=u8::MAX).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>"))).then_some(vocab)
}

/// Takes away the seams at which `token` would be found on one side, or find what is beside it, otherwise than in the whole.
fn keep_whole(token: &AddedToken, at: &mut Table) {
    let after = |c: char| only(if c == SPACE { ' ' } else { c });
    let rows = |c: char| {
        let group = group(c);
        Symbol::all().filter(move |&symbol| group.has(symbol))
    };
    let content = || token.content.chars();
    for (before, c) in content().zip(content().skip(1)) {
        rows(before).for_each(|symbol| at[symbol.index()].remove(after(c)));
    }
    // What follows an added token begins anew.
    content().next_back().into_iter().flat_map(rows).for_each(|symbol| at[symbol.index()] = Symbols::NONE);
    if token.single_word {
        content()
            .next()
            .map(after)
            .into_iter()
            .for_each(|first| at.iter_mut().for_each(|row| row.remove(first)));
    }
    keep_spaces(token, at);
}

/// Takes away the seams at which spaces that `token` wants would be out of its reach.
fn keep_spaces(token: &AddedToken, at: &mut Table) {
    let mut taken = Symbols::NONE;
    if token.lstrip || token.rstrip {
        ASCII_SPACES.iter().for_each(|&space| taken = taken.or(only(space)));
    }
    if token.lstrip {
        token.content.chars().next().into_iter().for_each(|first| taken = taken.or(only(first)));
    }
    // After a space beyond ASCII there is no seam.
    for space in ASCII_SPACES.iter().filter_map(|&space| Symbol::before(space)) {
        at[space.index()].remove(taken);
    }
}

#[cfg(test)]
mod tests;
