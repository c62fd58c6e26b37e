//! Progress of loading: bars on a terminal, elsewhere a line at the end.

use std::io::{self, IsTerminal};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use muster_model::LoadProgress;

use crate::{out, text};

/// A group of bars.
pub(crate) struct Bars {
    bars: MultiProgress,
    is_terminal: bool,
}

impl Bars {
    pub(crate) fn new() -> Self {
        let is_terminal = io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: MultiProgress::with_draw_target(target), is_terminal }
    }

    /// Adds a bar for something that is loaded.
    pub(crate) fn bar(&self, label: String) -> Bar {
        let style = ProgressStyle::with_template(
            "{prefix:<12} {bar:32} {decimal_bytes:>10} of {decimal_total_bytes}",
        );
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(0).with_style(style).with_prefix(label.clone()));
        Bar { bar, label, before: 0, is_terminal: self.is_terminal }
    }
}

/// One bar.
#[derive(Clone)]
pub(crate) struct Bar {
    bar: ProgressBar,
    label: String,
    /// Bytes loaded before the current part.
    before: u64,
    is_terminal: bool,
}

impl Bar {
    /// A bar without a group.
    pub(crate) fn single(label: &str) -> Self {
        Bars::new().bar(label.to_owned())
    }

    pub(crate) fn update(&self, progress: LoadProgress) {
        self.bar.set_length(self.before + progress.total_bytes);
        self.bar.set_position(self.before + progress.done_bytes);
    }

    /// The same bar for the next part, on top of the bytes loaded so far.
    pub(crate) fn after_this(&self) -> Self {
        Self { before: self.bar.position(), ..self.clone() }
    }

    /// Removes the bar; without a terminal, prints a line.
    pub(crate) fn finish(&self) {
        let loaded = self.bar.position();
        self.bar.finish_and_clear();
        if !self.is_terminal && loaded > 0 {
            out::note(&format!("{}: loaded {}", self.label, text::bytes(loaded)));
        }
    }
}
