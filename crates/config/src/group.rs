//! Keys of settings, their groups and roles. Does not know the sources of values.

/// One setting of a role: its name, form, default and documentation.
#[derive(Debug)]
pub struct Key {
    pub(crate) name: &'static str,
    pub(crate) form: Form,
    pub(crate) default: DefaultTo,
    /// Lines of its documentation.
    pub(crate) about: &'static [&'static str],
}

/// Written form of a setting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) kind: ValueKind,
    /// Placeholder in help; empty for a switch that is only ever turned on.
    pub(crate) placeholder: &'static str,
}

/// The type of a setting in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    Text,
    Number,
    /// A number, or a word that stands for one.
    NumberOrText,
    Switch,
    List,
}

/// Default of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultTo {
    /// This value, as a flag would give it.
    Value(&'static str),
    /// A default that no value expresses, in words.
    Words(&'static str),
    /// No default: the setting is optional without one, or required.
    Nothing,
}

/// Settings under one heading.
#[derive(Debug)]
pub struct Group {
    /// Heading in help; `None` for a role's own settings.
    pub heading: Option<&'static str>,
    /// Parts in the order of help and documentation.
    pub keys: &'static [Key],
}

/// All settings of a role.
#[derive(Debug)]
pub struct Role {
    /// Name of its table in a file, and part of its variables' names.
    pub name: &'static str,
    /// Parts in the order of help and documentation.
    pub groups: &'static [Group],
}

impl Form {
    pub(crate) const fn text(placeholder: &'static str) -> Self {
        Self { kind: ValueKind::Text, placeholder }
    }

    pub(crate) const fn list(placeholder: &'static str) -> Self {
        Self { kind: ValueKind::List, placeholder }
    }
}

pub(crate) const NUMBER: Form = Form { kind: ValueKind::Number, placeholder: "N" };
pub(crate) const NUMBER_OR_WORD: Form = Form { kind: ValueKind::NumberOrText, placeholder: "N" };
/// A switch that can be turned off.
pub(crate) const BOOL: Form = Form { kind: ValueKind::Switch, placeholder: "BOOL" };
pub(crate) const SWITCH: Form = Form { kind: ValueKind::Switch, placeholder: "" };
pub(crate) const ADDR: Form = Form::text("ADDR");
pub(crate) const DTYPE: Form = Form::text("DTYPE");
pub(crate) const FILE: Form = Form::text("FILE");
pub(crate) const MODE: Form = Form::text("MODE");
pub(crate) const NAME: Form = Form::text("NAME");
pub(crate) const SIZE: Form = Form::text("SIZE");
pub(crate) const TIME: Form = Form::text("TIME");

impl ValueKind {
    pub(crate) const fn in_toml(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Number => "a decimal integer",
            Self::NumberOrText => "a decimal integer or a string",
            Self::Switch => "true or false",
            Self::List => "an array of strings",
        }
    }
}

impl Key {
    /// Name in a file, with underscores.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Name on the command line, without dashes in front. Each entry of a list is given with a flag of its own.
    #[must_use]
    pub fn flag(&self) -> String {
        let name = if self.is_list() { self.name.trim_end_matches('s') } else { self.name };
        name.replace('_', "-")
    }

    /// Whether it takes several values.
    #[must_use]
    pub fn is_list(&self) -> bool {
        self.form.kind == ValueKind::List
    }

    /// Placeholder of its value in help; `None` where the flag takes none.
    #[must_use]
    pub fn placeholder(&self) -> Option<&'static str> {
        Some(self.form.placeholder).filter(|placeholder| !placeholder.is_empty())
    }

    /// Its default.
    #[must_use]
    pub const fn default(&self) -> DefaultTo {
        self.default
    }

    /// Its description, for help.
    #[must_use]
    pub fn help(&self) -> String {
        self.paragraphs().next().unwrap_or_default()
    }

    /// Further remarks, for the page.
    #[must_use]
    pub fn remarks(&self) -> String {
        self.paragraphs().skip(1).collect::<Vec<_>>().join(" ")
    }

    fn paragraphs(&self) -> impl Iterator<Item = String> {
        let paragraphs = self.about.split(|line| line.trim().is_empty());
        paragraphs.map(|lines| lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" "))
    }
}

impl Role {
    /// Its settings.
    pub fn keys(&self) -> impl Iterator<Item = &'static Key> {
        self.groups.iter().flat_map(|group| group.keys)
    }

    /// The environment variable of a key.
    pub(crate) fn variable(&self, key: &str) -> String {
        format!("MUSTER_{}_{}", self.name.to_uppercase(), key.to_uppercase())
    }
}
