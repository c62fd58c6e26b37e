//! Output of a server's progress: JSON for a parent process, or a bar on the terminal.

use muster_model::LoadProgress;

use crate::args::ConfigArgs;
use crate::children::{Announcement, Listening, announce};
use crate::progress::Bar;

/// Audience of the progress.
#[derive(Clone)]
pub(crate) enum Outlet {
    /// A user at a terminal.
    Person(Bar),
    /// A process that wants one line when the server is ready.
    Script,
    /// A parent process with its own bars.
    Parent,
}

impl Outlet {
    pub(crate) fn of(args: &ConfigArgs, label: &str) -> Self {
        match (args.announce, args.announce_loading) {
            (false, _) => Self::Person(Bar::single(label)),
            (true, false) => Self::Script,
            (true, true) => Self::Parent,
        }
    }

    /// Callback for the progress of loading.
    pub(crate) fn progress(&self) -> Box<dyn FnMut(LoadProgress) + Send> {
        match self {
            Self::Person(bar) => {
                let bar = bar.clone();
                Box::new(move |progress| bar.update(progress))
            }
            Self::Script => Box::new(|_| {}),
            Self::Parent => Box::new(announce_loading()),
        }
    }

    /// Callback for readiness.
    pub(crate) fn ready(&self) -> impl FnOnce(Listening) + Send + use<> {
        let outlet = self.clone();
        move |listening| match outlet {
            Self::Person(bar) => bar.finish(),
            Self::Script | Self::Parent => announce(&Announcement::Ready(listening)),
        }
    }
}

/// Announces progress, at most once per percent.
fn announce_loading() -> impl FnMut(LoadProgress) + Send {
    let mut announced = None;
    move |progress: LoadProgress| {
        let hundredth = progress.done_bytes.saturating_mul(100).checked_div(progress.total_bytes);
        if hundredth != announced {
            announced = hundredth;
            announce(&Announcement::Loading { done: progress.done_bytes, total: progress.total_bytes });
        }
    }
}
