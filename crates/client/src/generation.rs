//! One generation, over as many streams as it takes.
//!
//! Always holds: between two events the delivered tokens are known exactly, so a broken stream costs only time. A future of
//! [`Generation::next`] may be dropped at any time; the next one goes on, and repeats an attempt that was in progress.

use std::time::{Duration, Instant};

use muster_proto::v1::generate_event::Event as Sent;
use muster_proto::v1::{GenerateEvent, GenerateRequest, Started};
use tonic::{Status, Streaming};

use crate::attempts::Attempts;
use crate::error::ClientError;
use crate::progress::{Event, Progress};
use crate::routers::Client;
use crate::trouble::Trouble;

/// A generation: its `started`, then its events. Dropping it ends it.
#[derive(Debug)]
pub struct Generation {
    source: Source,
    progress: Progress,
    /// `None` after a break.
    stream: Option<Streaming<GenerateEvent>>,
    resumed: u32,
    failed: bool,
}

/// Where streams come from.
#[derive(Debug)]
struct Source {
    client: Client,
    request: GenerateRequest,
    attempts: Attempts,
    /// Routers in a row that refused to resume it.
    refusals: usize,
    /// The router in use, or to try next.
    at: usize,
    /// Time of the next attempt.
    not_before: Instant,
    deadline: Option<Instant>,
}

impl Client {
    /// Starts a generation. Dropping it ends it.
    ///
    /// # Errors
    /// When the request is refused, or no router accepts it in time.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, ClientError> {
        Generation::start(self.clone(), request).await
    }
}

impl Generation {
    async fn start(client: Client, request: GenerateRequest) -> Result<Self, ClientError> {
        let now = Instant::now();
        let (attempts, at) = (client.attempts(), client.preferred());
        let deadline = client.policy().generation.map(|limit| now + limit);
        let choices = request.choices.unwrap_or(1);
        let mut source = Source { client, request, attempts, refusals: 0, at, not_before: now, deadline };
        let (started, stream) = source.open(None).await?;
        let progress = Progress::new(started, choices);
        Ok(Self { source, progress, stream: Some(stream), resumed: 0, failed: false })
    }

    /// Its `started`.
    #[must_use]
    pub const fn started(&self) -> &Started {
        self.progress.started()
    }

    /// Number of times that it was resumed.
    #[must_use]
    pub const fn resumed(&self) -> u32 {
        self.resumed
    }

    /// The next event; `None` after the end of every choice.
    ///
    /// # Errors
    /// When no router resumes it in time, or a router breaks the protocol. No event follows.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        if self.failed {
            return Ok(None);
        }
        let event = self.advance().await;
        if event.is_err() {
            (self.failed, self.stream) = (true, None);
        }
        event
    }

    async fn advance(&mut self) -> Result<Option<Event>, ClientError> {
        while !self.progress.is_complete() {
            let Some(stream) = &mut self.stream else {
                let (_, stream) = self.source.open(Some(&mut self.progress)).await?;
                self.stream = Some(stream);
                self.resumed = self.resumed.saturating_add(1);
                continue;
            };
            let trouble = match within(self.source.deadline, stream.message()).await {
                None => return Err(self.source.overdue()),
                Some(Ok(Some(sent))) => match self.progress.accept(sent.event) {
                    Ok(Some(event)) => {
                        self.source.attempts.progressed();
                        return Ok(Some(event));
                    }
                    Ok(None) => continue,
                    Err(violation) => return Err(self.source.violated(violation)),
                },
                Some(Ok(None)) => Trouble::passing("the stream ended early"),
                Some(Err(status)) => status.into(),
            };
            self.stream = None;
            let tokens = self.progress.tokens();
            if let Trouble::Passing { reason, hint } = &trouble {
                let router = self.source.client.url(self.source.at);
                tracing::warn!(%router, tokens, %reason, "the router did not end it; asking for the rest of it");
                if hint.is_some() {
                    self.source.attempts.given_up();
                }
            }
            self.source.lost(trouble, tokens)?;
        }
        Ok(None)
    }
}

impl Source {
    /// Opens a stream at the first router that accepts the request, from its beginning or behind the delivered tokens.
    async fn open(
        &mut self,
        mut progress: Option<&mut Progress>,
    ) -> Result<(Started, Streaming<GenerateEvent>), ClientError> {
        let tokens = progress.as_ref().map_or(0, |progress| progress.tokens());
        loop {
            let request = match &progress {
                None => self.request.clone(),
                Some(progress) => self.resuming(progress),
            };
            if within(self.deadline, tokio::time::sleep_until(self.not_before.into())).await.is_none() {
                return Err(self.overdue());
            }
            let Some(opened) = within(self.deadline, self.ask(request)).await else {
                return Err(self.overdue());
            };
            let trouble = match (opened, &mut progress) {
                (Ok((started, stream)), None) => return Ok(self.admitted(started, stream)),
                (Ok((started, stream)), Some(progress)) => match progress.goes_on(&started) {
                    Ok(()) => return Ok(self.admitted(started, stream)),
                    Err(difference) => Trouble::Final(Status::failed_precondition(difference)),
                },
                (Err(trouble), _) => trouble,
            };
            match trouble {
                // Another router may serve the same model and resume the stream.
                Trouble::Final(status) if progress.is_some() => self.refused(&status, tokens)?,
                trouble => {
                    if let Trouble::Passing { reason, .. } = &trouble
                        && let Some(other) = self.client.others(self.at, reason).await
                    {
                        return Err(other);
                    }
                    self.lost(trouble, tokens)?;
                }
            }
        }
    }

    /// The request that resumes behind the delivered tokens, with the stream's seed, given or chosen.
    fn resuming(&self, progress: &Progress) -> GenerateRequest {
        let mut request = self.request.clone();
        request.sampling.get_or_insert_default().seed = Some(progress.started().seed);
        request.resume_from = Some(progress.resume());
        request
    }

    /// One attempt at one router.
    async fn ask(&self, request: GenerateRequest) -> Result<(Started, Streaming<GenerateEvent>), Trouble> {
        let limit = self.client.policy().answer;
        let mut inference = self.client.inference(self.at);
        let asked = async {
            let mut stream = inference.generate(request).await?.into_inner();
            let first = stream.message().await?;
            Ok::<_, Status>((first, stream))
        };
        match tokio::time::timeout(limit, asked).await {
            Err(_) => Err(Trouble::passing(format!("not admitted within {limit:?}"))),
            Ok(Err(status)) => Err(status.into()),
            Ok(Ok((None, _))) => Err(Trouble::passing("the stream ended before it started")),
            Ok(Ok((Some(GenerateEvent { event: Some(Sent::Started(started)) }), stream))) => {
                Ok((started, stream))
            }
            Ok(Ok(_)) => Err(Trouble::Final(Status::internal("a stream does not begin with `started`"))),
        }
    }

    fn admitted(
        &mut self,
        started: Started,
        stream: Streaming<GenerateEvent>,
    ) -> (Started, Streaming<GenerateEvent>) {
        self.attempts.admitted(Instant::now());
        self.refusals = 0;
        self.client.prefer(self.at);
        (started, stream)
    }

    /// Turns to the next router after losing the one in use.
    fn lost(&mut self, trouble: Trouble, tokens: usize) -> Result<(), ClientError> {
        let router = self.client.url(self.at);
        let (reason, hint) = match trouble {
            Trouble::Final(status) => return Err(ClientError::of(&status, router)),
            Trouble::Passing { reason, hint } => (reason, hint),
        };
        tracing::debug!(%router, tokens, %reason, "turning to the next router");
        match self.attempts.failed(Instant::now(), hint) {
            Some(next) => self.not_before = next,
            None => return Err(ClientError::Lost { tokens, reason: format!("{router}: {reason}") }),
        }
        self.at = self.client.after(self.at);
        Ok(())
    }

    /// Turns to the next router after the one in use refused to resume, unless all refused.
    fn refused(&mut self, status: &Status, tokens: usize) -> Result<(), ClientError> {
        self.refusals += 1;
        let reason = status.message();
        if self.refusals >= self.client.count() {
            let router = self.client.url(self.at);
            return Err(ClientError::Lost { tokens, reason: format!("{router}: {reason}") });
        }
        self.lost(Trouble::passing(reason), tokens)
    }

    fn violated(&self, violation: String) -> ClientError {
        ClientError::Protocol { router: self.client.url(self.at).to_owned(), violation }
    }

    fn overdue(&self) -> ClientError {
        ClientError::Deadline { limit: self.client.policy().generation.unwrap_or(Duration::ZERO) }
    }
}

/// What comes in time; `None` at the deadline.
async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(work.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
    }
}
