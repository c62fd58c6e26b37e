//! Where a server's progress goes: to a parent process as JSON, or to the terminal as a bar.

use muster_model::LoadProgress;

use crate::args::ConfigArgs;
use crate::children::{Announcement, Listening, announce};
use crate::progress::Bar;

/// Who is told.
#[derive(Clone)]
pub(crate) enum Outlet {
    /// A person.
    Person(Bar),
    /// A process that wants one line when all is ready.
    Script,
    /// A parent that shows progress itself.
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

    /// To be called while weights are read.
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

    /// To be called when all is ready.
    pub(crate) fn ready(&self) -> impl FnOnce(Listening) + Send + use<> {
        let outlet = self.clone();
        move |listening| match outlet {
            Self::Person(bar) => bar.finish(),
            Self::Script | Self::Parent => announce(&Announcement::Ready(listening)),
        }
    }
}

/// Announces progress, at most once for every hundredth of the way.
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
