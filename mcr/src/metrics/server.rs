//! The server of the pages: a bounded number of connections, each of which brings one short request in time and
//! takes its answer in time.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::{Mutex, mpsc, oneshot},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Question, Survey,
    address::Listener,
    exposition,
    http::{self, Answer, Get, Status},
};
use crate::{api::wire::Health, sys::privileges};

/// Connections at a time; the oldest that has not asked makes room for the next.
const CONNECTIONS: usize = 16;
/// Bytes of a request, its headers included.
const REQUEST_BYTES: usize = 8 << 10;
/// For a request to arrive.
const REQUEST: Duration = Duration::from_secs(5);
/// For an answer to be taken.
const ANSWER: Duration = Duration::from_secs(10);
/// For a client to hang up that has its answer, which a connection that is reset could lose.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long the supervisor may take to give a sign of life.
const ALIVE: Duration = Duration::from_secs(1);
/// How long it may take to answer with a survey.
const SURVEY: Duration = Duration::from_secs(2);
/// How long a survey serves whoever asks: so often at most is the supervisor asked for one.
const FRESH: Duration = Duration::from_millis(100);

/// Questions that may wait for the supervisor.
const QUESTIONS: usize = 4;

/// The server's thread. Dropping it ends it.
pub struct Server {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `listener`; answers to the questions are pages.
    pub fn start(listener: Listener) -> io::Result<(Self, mpsc::Receiver<Question>)> {
        let (questions, asked) = mpsc::channel(QUESTIONS);
        let (end, ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || {
            if let Err(error) = privileges::drop_all() {
                return warn!(
                    "metrics are not served, since their thread cannot give up its capabilities: {error}"
                );
            }
            if let Err(error) = runtime.block_on(serve(listener, Desk::new(questions), ended)) {
                warn!(%error, "metrics are not served any more");
            }
        };
        let thread = thread::Builder::new().name("mcr-metrics".to_owned()).spawn(run)?;
        Ok((Self { end: Some(end), thread: Some(thread) }, asked))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _panicked_already = thread.join();
        }
    }
}

/// Whom the connections ask.
struct Desk {
    questions: mpsc::Sender<Question>,
    /// The last survey. One connection at a time asks for the next, and the others wait for it.
    survey: Mutex<Option<(Instant, Arc<Survey>)>>,
}

impl Desk {
    fn new(questions: mpsc::Sender<Question>) -> Arc<Self> {
        Arc::new(Self { questions, survey: Mutex::new(None) })
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.questions.send(question(answer)).await.ok()?;
        answered.await.ok()
    }

    async fn survey(&self) -> Option<Arc<Survey>> {
        let mut last = self.survey.lock().await;
        if let Some((_, survey)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Some(Arc::clone(survey));
        }
        let survey = Arc::new(self.ask(Question::Survey).await?);
        *last = Some((Instant::now(), Arc::clone(&survey)));
        Some(survey)
    }

    async fn answer(&self, get: &Get) -> Answer {
        match &get.path[..] {
            "/metrics" => self.with_survey(|survey| metrics(survey, get.open_metrics)).await,
            "/readyz" => self.with_survey(|survey| readiness(&survey)).await,
            "/healthz" => match timeout(ALIVE, self.ask(Question::Alive)).await {
                Ok(Some(())) => Answer::text(Status::Ok, "alive\n"),
                _ => silent(),
            },
            _ => Answer::text(Status::NotFound, "there are /metrics, /healthz and /readyz\n"),
        }
    }

    async fn with_survey(&self, page: impl FnOnce(Arc<Survey>) -> Answer) -> Answer {
        match timeout(SURVEY, self.survey()).await {
            Ok(Some(survey)) => page(survey),
            _ => silent(),
        }
    }
}

fn silent() -> Answer {
    Answer::text(Status::Unavailable, "the supervisor does not answer\n")
}

fn metrics(survey: Arc<Survey>, open_metrics: bool) -> Answer {
    match exposition::page(survey, open_metrics) {
        Ok(body) => {
            let content_type = if open_metrics { exposition::OPEN_METRICS } else { exposition::PROMETHEUS };
            Answer { status: Status::Ok, content_type, body }
        }
        Err(error) => Answer::text(Status::Unavailable, format!("{error}\n")),
    }
}

/// Ready is what `mcr status` calls working; what it lists otherwise is listed here.
fn readiness(survey: &Survey) -> Answer {
    if survey.health == Health::Active {
        return Answer::text(Status::Ok, "ready\n");
    }
    let lines = survey.problems.iter().map(|problem| format!("{}\n  next: {}\n", problem.what, problem.next));
    Answer::text(Status::Unavailable, lines.collect::<String>())
}

async fn serve(listener: Listener, desk: Arc<Desk>, ended: oneshot::Receiver<()>) -> io::Result<()> {
    match listener {
        Listener::Tcp(listener) => {
            let listener = TcpListener::from_std(listener)?;
            accept(async || Ok(listener.accept().await?.0), desk, ended).await;
        }
        Listener::Unix(listener, _removed_on_drop) => {
            let listener = UnixListener::from_std(listener)?;
            accept(async || Ok(listener.accept().await?.0), desk, ended).await;
        }
    }
    Ok(())
}

/// Serves connections until the other end of `ended` is gone.
async fn accept<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    next: impl AsyncFn() -> io::Result<S>,
    desk: Arc<Desk>,
    mut ended: oneshot::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    loop {
        tokio::select! {
            _ = &mut ended => return,
            Some(_) = connections.join_next() => {}
            accepted = next() => match accepted {
                Ok(stream) if clients.have_room() => {
                    let asks = Arc::new(AtomicBool::new(false));
                    let connection = connections.spawn(converse(stream, Arc::clone(&desk), Arc::clone(&asks)));
                    clients.0.push_back((connection, asks));
                }
                // All are being answered: to close it says so at once.
                Ok(stream) => drop(stream),
                Err(error) => {
                    warn!(%error, "cannot accept a connection for metrics");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// The connections, oldest first, and whether each has brought its request.
#[derive(Default)]
struct Clients(VecDeque<(AbortHandle, Arc<AtomicBool>)>);

impl Clients {
    /// Whether there is room for one more, if need be in the place of one that has not asked.
    fn have_room(&mut self) -> bool {
        self.0.retain(|(connection, _)| !connection.is_finished());
        if self.0.len() < CONNECTIONS {
            return true;
        }
        let idle = self.0.iter().position(|(_, asks)| !asks.load(Relaxed));
        let idle = idle.and_then(|place| self.0.remove(place));
        idle.inspect(|(connection, _)| connection.abort()).is_some()
    }
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(stream: S, desk: Arc<Desk>, asks: Arc<AtomicBool>) {
    if let Err(error) = exchange(stream, &desk, &asks).await {
        debug!(%error, "a connection for metrics ended");
    }
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    desk: &Desk,
    asks: &AtomicBool,
) -> io::Result<()> {
    let request = timeout(REQUEST, read(&mut stream)).await??;
    asks.store(true, Relaxed);
    let (answer, headers_alone) = match request {
        Ok(get) => (desk.answer(&get).await, get.headers_alone),
        Err(answer) => (answer, false),
    };
    let send = async {
        stream.write_all(answer.head().as_bytes()).await?;
        if !headers_alone {
            stream.write_all(answer.body.as_bytes()).await?;
        }
        stream.shutdown().await
    };
    timeout(ANSWER, send).await??;
    drop(answer);
    let mut rest = [0; 1024];
    let farewell = async {
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    timeout(FAREWELL, farewell).await?
}

/// A request, or what to answer to what is none.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<Get, Answer>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let length = stream.read(&mut chunk).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&chunk[..length]);
        match http::parse(&bytes) {
            Ok(Some(get)) => return Ok(Ok(get)),
            Ok(None) if bytes.len() >= REQUEST_BYTES => return Ok(Err(http::too_large())),
            Ok(None) => {}
            Err(answer) => return Ok(Err(answer)),
        }
    }
}
