//! All addresses of a name, resolved again and again.
//!
//! Resolvers give a part of a long answer now and then, and none at all while they are restarted. So an address goes only when
//! answers have lacked it for [`ABSENT`], and what is known outlives [`EMPTY`] of answers without any address and
//! [`FAILING`] without an answer. (The system's resolver reports a name that is not there as an error like any other.)
//! Of a name with addresses of both families the IPv4 ones are used: a worker that is reached by both would be known twice.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::seen::{MOST, Place, Seen};

/// Interval of look-ups.
const EVERY: Duration = Duration::from_secs(5);
/// Interval of look-ups while no address is known.
const EAGER: Duration = Duration::from_secs(1);
/// Deadline of the resolver.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time for which an address is kept that is no longer in the answers.
const ABSENT: Duration = Duration::from_secs(15);
/// Time for which all are kept while answers are empty.
const EMPTY: Duration = Duration::from_secs(60);
/// Time for which all are kept while there are no answers.
const FAILING: Duration = Duration::from_secs(300);

pub(crate) fn watch(host: String, port: u16) -> watch::Receiver<Seen> {
    let resolve = move || {
        let host = host.clone();
        async move { Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect()) }
    };
    watch_with(resolve)
}

/// The same with another resolver.
fn watch_with<R, F>(resolve: R) -> watch::Receiver<Seen>
where
    R: Fn() -> F + Send + 'static,
    F: Future<Output = io::Result<Vec<SocketAddr>>> + Send,
{
    let (sender, receiver) = watch::channel(Seen::not_yet());
    tokio::spawn(async move {
        let mut memory = Memory::new(Instant::now());
        loop {
            let answer = match timeout(PATIENCE, resolve()).await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err(format!("no answer within {PATIENCE:?}")),
            };
            let seen = memory.take(Instant::now(), answer);
            let pause = if seen.workers.is_empty() { EAGER } else { EVERY };
            sender.send_if_modified(|now| std::mem::replace(now, seen.clone()) != seen);
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
    receiver
}

/// State of a name's answers.
struct Memory {
    /// By address: time of the last answer with it.
    known: BTreeMap<SocketAddr, Instant>,
    /// The last answer that had an address.
    good: Instant,
    /// The last answer.
    answered: Instant,
    /// The last logged problem.
    complaint: Option<String>,
}

impl Memory {
    const fn new(now: Instant) -> Self {
        Self { known: BTreeMap::new(), good: now, answered: now, complaint: None }
    }

    fn take(&mut self, now: Instant, answer: Result<Vec<SocketAddr>, String>) -> Seen {
        let problem = match answer {
            Ok(addresses) if addresses.is_empty() => {
                self.answered = now;
                if now - self.good > EMPTY {
                    self.known.clear();
                }
                Some("the name has no addresses".to_owned())
            }
            Ok(addresses) => {
                (self.answered, self.good) = (now, now);
                let addresses = of_one_family(addresses);
                let more = addresses.len() > MOST;
                self.known.extend(addresses.into_iter().take(MOST).map(|address| (address, now)));
                self.known.retain(|_, last| now - *last <= ABSENT);
                while self.known.len() > MOST {
                    let oldest =
                        self.known.iter().min_by_key(|(_, last)| **last).map(|(address, _)| *address);
                    oldest.map(|address| self.known.remove(&address));
                }
                more.then(|| format!("the name has more than {MOST} addresses; the rest is left out"))
            }
            Err(error) => {
                // Beside empty answers, so that a mixture of both does not keep everything for ever.
                if now - self.answered > FAILING || now - self.good > FAILING {
                    self.known.clear();
                }
                Some(format!("the name cannot be resolved ({error})"))
            }
        };
        if self.complaint != problem {
            match &problem {
                Some(problem) => tracing::warn!(kept = self.known.len(), "DNS: {problem}"),
                None => tracing::info!(addresses = self.known.len(), "DNS: the name is resolved"),
            }
            self.complaint.clone_from(&problem);
        }
        Seen { workers: self.known.keys().map(|address| (*address, Place::default())).collect(), problem }
    }
}

fn of_one_family(addresses: Vec<SocketAddr>) -> BTreeSet<SocketAddr> {
    let any_v4 = addresses.iter().any(SocketAddr::is_ipv4);
    addresses.into_iter().filter(|address| address.is_ipv4() == any_v4).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    type Answer = Result<Vec<&'static str>, &'static str>;

    /// A name whose answer can be changed.
    fn name(answer: Answer) -> (Arc<Mutex<Answer>>, watch::Receiver<Seen>) {
        let answer = Arc::new(Mutex::new(answer));
        let asked = answer.clone();
        let resolve = move || {
            let answer = asked.lock().unwrap().clone();
            async move {
                let parse = |texts: Vec<&str>| texts.iter().map(|text| text.parse().unwrap()).collect();
                answer.map(parse).map_err(io::Error::other)
            }
        };
        (answer, watch_with(resolve))
    }

    fn addresses(seen: &watch::Receiver<Seen>) -> Vec<String> {
        seen.borrow().workers.keys().map(ToString::to_string).collect()
    }

    async fn pass(time: Duration) {
        tokio::time::sleep(time + Duration::from_millis(1)).await;
    }

    const A: &str = "10.0.0.1:7";
    const B: &str = "10.0.0.2:7";

    #[tokio::test(start_paused = true)]
    async fn addresses_come_at_once_and_go_after_a_while() {
        let (answer, seen) = name(Ok(vec![A]));
        assert!(seen.borrow().problem.is_some());
        pass(Duration::ZERO).await;
        assert_eq!((addresses(&seen), seen.borrow().problem.clone()), (vec![A.to_owned()], None));
        *answer.lock().unwrap() = Ok(vec![B]);
        pass(EVERY).await;
        assert_eq!(addresses(&seen), [A, B]);
        pass(ABSENT + EVERY).await;
        assert_eq!(addresses(&seen), [B]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_lacks_one_for_a_moment_changes_nothing() {
        let (answer, mut seen) = name(Ok(vec![A, B]));
        pass(Duration::ZERO).await;
        seen.mark_unchanged();
        *answer.lock().unwrap() = Ok(vec![B]);
        pass(ABSENT - EVERY).await;
        *answer.lock().unwrap() = Ok(vec![A, B]);
        pass(ABSENT * 4).await;
        assert_eq!(addresses(&seen), [A, B]);
        assert!(!seen.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn everything_is_kept_through_empty_answers_and_errors_for_a_bounded_time() {
        for (bad, time) in [(Ok(vec![]), EMPTY), (Err("SERVFAIL"), FAILING)] {
            let (answer, seen) = name(Ok(vec![A, B]));
            pass(Duration::ZERO).await;
            *answer.lock().unwrap() = bad;
            pass(time - EVERY).await;
            assert_eq!(addresses(&seen), [A, B]);
            assert!(seen.borrow().problem.is_some());
            pass(EVERY * 3).await;
            assert_eq!(addresses(&seen), Vec::<String>::new());
            *answer.lock().unwrap() = Ok(vec![A]);
            pass(EVERY).await;
            assert_eq!((addresses(&seen), seen.borrow().problem.clone()), (vec![A.to_owned()], None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn errors_between_empty_answers_keep_nothing_for_ever() {
        let (answer, seen) = name(Ok(vec![A]));
        pass(Duration::ZERO).await;
        let end = Instant::now() + FAILING + EVERY * 2;
        while Instant::now() < end {
            let empty = answer.lock().unwrap().is_ok();
            *answer.lock().unwrap() = if empty { Err("SERVFAIL") } else { Ok(vec![]) };
            pass(EVERY).await;
        }
        assert_eq!(addresses(&seen), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_hangs_is_a_problem_and_not_the_end() {
        let turn = Arc::new(Mutex::new(0));
        let count = turn.clone();
        let seen = watch_with(move || {
            let hangs = std::mem::replace(&mut *count.lock().unwrap(), 1) == 0;
            async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                Ok(vec![A.parse().unwrap()])
            }
        });
        pass(PATIENCE).await;
        assert!(seen.borrow().problem.as_ref().unwrap().contains("no answer within"));
        pass(EAGER).await;
        assert_eq!((addresses(&seen), seen.borrow().problem.clone()), (vec![A.to_owned()], None));
    }

    #[tokio::test(start_paused = true)]
    async fn one_family_is_used() {
        let (answer, seen) = name(Ok(vec!["[fd00::1]:7", A]));
        pass(Duration::ZERO).await;
        assert_eq!(addresses(&seen), [A]);
        *answer.lock().unwrap() = Ok(vec!["[fd00::1]:7"]);
        pass(ABSENT + EVERY * 2).await;
        assert_eq!(addresses(&seen), ["[fd00::1]:7"]);
    }

    #[test]
    fn no_name_has_too_many() {
        let now = Instant::now();
        let mut memory = Memory::new(now);
        for block in 0..3u32 {
            let address = |n| SocketAddr::from((std::net::Ipv4Addr::from(block << 24 | n), 1));
            let seen = memory.take(now, Ok((1..=5000).map(address).collect()));
            assert_eq!(seen.workers.len(), MOST);
            assert!(seen.problem.unwrap().contains("more than 4096"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_when_nobody_listens() {
        let asked = Arc::new(());
        let held = asked.clone();
        let seen = watch_with(move || {
            let _held = &held;
            async { Ok(Vec::new()) }
        });
        pass(EAGER).await;
        assert_eq!(Arc::strong_count(&asked), 2);
        drop(seen);
        pass(EVERY).await;
        assert_eq!(Arc::strong_count(&asked), 1);
    }
}
