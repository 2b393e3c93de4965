//! The supervisor's loop: carries out what [`State`] plans, with real descriptors, processes and clocks.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use nix::unistd::{AccessFlags, access, geteuid};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::{Interval, MissedTickBehavior, interval, sleep},
};
use tracing::{debug, error, info, warn};

use crate::{
    api::{
        server::{self, Call},
        socket::{self, ControlLock},
        wire::{Alarm, Request},
    },
    config::Config,
    datapath::{af_packet, af_xdp, budget},
    ebpf::{self, Object, Placement, RedirectOutput, Steering},
    metrics::{Question, address::Listener, server::Server},
    net::{
        egress_hooks::EgressHooks,
        egress_socket::{self, SourcePort},
        links::{LinkWatch, Links},
        membership::{Membership, Memberships, Stored},
        neighbours::{Host, NeighbourWatch, NextHop, NextHops},
        packet_socket::PacketSocket,
        redirect_target::takes_redirects,
    },
    rule::{Datapath, DatapathChoice, IfIndex, InterfaceName, QueueId, Rule, RuleName, RuleSlot},
    ruleset::{Entry, OUTPUTS_PER_RULE, RuleSet},
    supervisor::{
        Launch,
        balance::{Balance, Subject},
        books::{Books, Programs},
        configuration::{Configuration, overdue},
        devices::Devices,
        event::{Effect, Event, Failure, Fanout, FrameSource, Joined, Targets, WorkerId, WorkerSpec},
        host::{self, Namespace},
        inheritance::Succeeded,
        journal::Journal,
        log::LogControl,
        service::Service,
        settings::Settings,
        state::{Limits, State},
        subscribers::Subscribers,
        worker_process::{self, End, WorkerProcess},
    },
    sys::{
        ethtool,
        privileges::{self, Account},
    },
    worker::{
        ledger::Layout,
        protocol::{Ingress, PacketRing, Setup, UmemShape},
    },
};

/// Calls that wait for the supervisor.
const CALLS: usize = 256;

/// How long the source port of the daemon before is waited for.
const PORT_LINGERS: Duration = Duration::from_secs(1);

/// How often the counters of the devices are read where nobody asks: what was lost since then is not known of
/// a device that goes.
const DEVICES_PERIOD: Duration = Duration::from_secs(10);

/// How often neighbours that are known are used in the kernel's eyes: within the time, five seconds by default, in
/// which it asks one again that it has not heard of for long, and calls it stale otherwise.
const NEIGHBOURS_PERIOD: Duration = Duration::from_secs(4);

/// A worker's packet socket.
pub struct PacketIngress {
    pub socket: PacketSocket,
    ring: PacketRing,
    /// What the worker's ledger had received when the socket was made.
    base: u64,
}

impl PacketIngress {
    pub fn slots(&self) -> u64 {
        self.ring.slots().into()
    }
}

/// Everything that the supervisor owns.
pub struct Daemon {
    pub settings: Settings,
    pub state: State,
    pub programs: Programs,
    pub books: Books,
    pub balance: Balance,
    pub alarms: BTreeMap<Subject, Alarm>,
    pub devices: Devices,
    pub log: LogControl,
    pub service: Service,
    pub since: SystemTime,
    pub workers: BTreeMap<WorkerId, WorkerProcess>,
    pub packet_sockets: BTreeMap<WorkerId, PacketIngress>,
    pub configuration: Configuration,
    pub subscribers: Subscribers,
    pub journal: Journal,
    /// What keeps rules that are added by command from outliving the daemon, if something does.
    pub journal_failure: Option<String>,
    /// What is to be remembered has changed.
    pub journal_is_old: bool,
    pub source_port: u16,
    /// Interfaces of which it has been said that `auto` takes AF_PACKET there.
    fallbacks: BTreeSet<InterfaceName>,
    /// What redirected frames would pass by; `auto` redirects nothing where that cannot be known.
    hooks: Option<Arc<EgressHooks>>,
    pub object: Object,
    neighbours: NeighbourWatch,
    memberships: Memberships,
    /// Those that are to outlive the daemon.
    pub kept: Memberships,
    /// Why these would not, if they would not.
    holder_failure: Option<String>,
    /// The datapath that serves each rule, or did last.
    served: BTreeMap<RuleName, Datapath>,
    /// Programs that ours are to succeed.
    pub formers: BTreeMap<InterfaceName, Succeeded>,
    pub pins: PathBuf,
    events: mpsc::UnboundedSender<Event>,
    ends: mpsc::UnboundedSender<End>,
    /// Wakes the loop up to end.
    pub stop: Arc<Notify>,
    /// What the kernel does by itself goes on when the daemon ends.
    pub keeps: bool,
}

/// The daemon's life.
pub async fn run(
    launch: Launch,
    settings: Settings,
    config: Config,
    log: LogControl,
    (service, stored): (Service, Stored),
) -> anyhow::Result<()> {
    host::check_capabilities()?;
    let group = settings.group.as_deref().map(privileges::group).transpose()?;
    let account = settings.user.as_deref().map(|user| Account::of(user, group)).transpose()?;
    if account.is_some() && !geteuid().is_root() {
        anyhow::bail!("--user is for root: leave it out, the daemon runs as user {} then", geteuid());
    }
    let object = Object::open(settings.bpf_object.as_deref())?;
    let limits = limits(&settings, &object)?;
    let lock = ControlLock::acquire(&settings.control)?;
    let namespace = host::claim_namespace(&settings.pin_root, limits.no_bpf.is_none())?;
    if geteuid().is_root() {
        // To root too: what a daemon of another user left is in its way once it has given up its power.
        let owner = account.clone().unwrap_or_else(Account::root);
        lock.give_to(&owner)?;
        namespace.give_to(&owner)?;
    }
    if service.is_managed() && stored.store.is_none() {
        warn!(
            "the service manager keeps no descriptors (FileDescriptorStoreMax=): memberships of redirected rules outlive the \
             daemon by a process, which KillMode=process spares alone"
        );
    }
    // While root may still call a holder that is another user's.
    let kept = Memberships::kept(&settings.pin_root, Path::new("/proc/self/exe"), stored)
        .inspect_err(|error| warn!("memberships of redirected rules will end with the daemon: {error}"));
    // And open what tells of legacy iptables.
    let hooks = EgressHooks::open().inspect_err(|error| warn!("auto redirects no rule: {error}"));
    let hooks = hooks.ok().map(Arc::new);
    step_down(account.as_ref())?;
    if limits.no_bpf.is_none() {
        namespace.check_pins()?;
    }
    let (journal, memory) = Journal::open(lock.journal());
    let source_port = hold_source_port(settings.source_port, memory.source_port).await?;
    let listener = tokio::net::UnixListener::from_std(socket::bind(&lock, group)?)?;
    let metrics = settings.metrics.as_ref().map(|address| address.bind(group)).transpose()?;
    let links = LinkWatch::open().context("the interfaces cannot be watched by netlink")?;
    let neighbours = NeighbourWatch::open().context("the neighbours cannot be watched by netlink")?;
    let first = links.snapshot().await.context("the interfaces cannot be read by netlink")?;

    let limits = Limits { source_port: source_port.get(), ..limits };
    let layout = Layout {
        queues: af_xdp::MAX_QUEUES,
        rules: limits.max_rules,
        outputs: limits.max_rules * OUTPUTS_PER_RULE,
    };
    let (events, incoming) = mpsc::unbounded_channel();
    let (ends, ended) = mpsc::unbounded_channel();
    let mut daemon = Daemon {
        books: Books::new(layout, limits.no_bpf.is_some()),
        balance: Balance::default(),
        alarms: BTreeMap::new(),
        devices: Devices::new(links.reader()),
        state: State::new(limits),
        programs: Programs::new(),
        log,
        service,
        since: SystemTime::now(),
        workers: BTreeMap::new(),
        packet_sockets: BTreeMap::new(),
        configuration: Configuration::new(launch),
        subscribers: Subscribers::default(),
        journal,
        journal_failure: None,
        journal_is_old: false,
        source_port: source_port.get(),
        fallbacks: BTreeSet::new(),
        hooks,
        object,
        neighbours,
        memberships: Memberships::default(),
        kept: kept.unwrap_or_default(),
        served: BTreeMap::new(),
        formers: BTreeMap::new(),
        holder_failure: None,
        pins: namespace.pins.clone(),
        events,
        ends,
        stop: Arc::new(Notify::new()),
        keeps: false,
        settings,
    };
    // Nothing that was left is touched unless this daemon can start.
    RuleSet::new(daemon.settings.max_rules).reload(config.rules.clone())?;
    daemon.state.apply(Event::Links(first));
    daemon.begin(&namespace, &links, config, memory).await?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        control = %daemon.settings.control.display(),
        source_port = source_port.get(),
        metrics = daemon.settings.metrics.as_ref().map(display),
        "ready"
    );
    let served = daemon.serve(listener, metrics, links, incoming, ended).await;
    daemon.end();
    leave(namespace, lock);
    served
}

/// Gives up what the daemon does not need, and sees that it still has what its workers need.
fn step_down(account: Option<&Account>) -> anyhow::Result<()> {
    privileges::step_down(account)
        .map_err(|error| anyhow::anyhow!("the daemon cannot give up what it does not need: {error}"))?;
    access("/proc/self/exe", AccessFlags::X_OK).with_context(|| {
        format!("user {} may not execute mcr itself: make it so, for its workers", geteuid())
    })
}

/// What the settings and this host give, or why they give too little.
fn limits(settings: &Settings, object: &Object) -> anyhow::Result<Limits> {
    host::check_io_uring()?;
    settings.check().map_err(anyhow::Error::msg)?;
    let no_bpf = host::check_bpf(object).err().map(|error| format!("{error:#}"));
    let named = settings.datapath.0;
    match &no_bpf {
        Some(why) if matches!(named, Some(Datapath::AfXdp | Datapath::Redirect)) => anyhow::bail!("{why}"),
        Some(why) if named.is_none() => warn!("every rule goes by af-packet, with a classic filter: {why}"),
        _ => {}
    }
    let cpus = match &settings.cpus {
        Some(cpus) => {
            host::check_cpus(cpus)?;
            cpus.clone()
        }
        None => host::default_cpus(),
    };
    let limits = Limits {
        max_rules: settings.max_rules,
        workers: settings.workers.map(std::num::NonZeroU32::get),
        cpus,
        cpus_chosen: settings.cpus.is_some(),
        source_port: 0,
        frames: settings.frames,
        max_run: host::max_run(),
        host: host::limits(),
        no_bpf,
    };
    check_budget(&limits, named)?;
    Ok(limits)
}

/// Refuses to start where not even one interface with one RX queue a worker would fit.
fn check_budget(limits: &Limits, datapath: Option<Datapath>) -> anyhow::Result<()> {
    const ETHERNET_MTU: u32 = 1500;
    let workers = limits.workers.unwrap_or(1);
    limits.host.check_descriptors(workers, limits.max_rules)?;
    let packet = limits.host.check(&budget::rings(workers, af_packet::ring(ETHERNET_MTU)), 0, 0);
    let xdp = af_xdp::chunk_bytes(ETHERNET_MTU)
        .map(|chunk| limits.host.check(&budget::umems(workers, limits.frames, chunk), 0, 0))?;
    // What `auto` cannot have of one datapath it may have of the other, and says so where it matters.
    if datapath == Some(Datapath::AfXdp) {
        xdp?;
    } else {
        packet?;
    }
    Ok(())
}

/// The source port that was asked for, else the one that the daemon before had chosen, else any.
async fn hold_source_port(asked: Option<u16>, former: Option<u16>) -> anyhow::Result<SourcePort> {
    if let (None, Some(former)) = (asked, former) {
        match hold_once_free(Some(former)).await {
            Ok(port) => return Ok(port),
            Err(error) => warn!(former, "the source port of before cannot be had, another is taken: {error}"),
        }
    }
    hold_once_free(asked).await.with_context(|| source_port_refused(asked))
}

/// The egress sockets of the daemon before may outlive it and its workers: the kernel takes an `io_uring` down later.
async fn hold_once_free(port: Option<u16>) -> io::Result<SourcePort> {
    let start = Instant::now();
    loop {
        match SourcePort::hold(port) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && start.elapsed() < PORT_LINGERS => {
                sleep(Duration::from_millis(10)).await;
            }
            held => return held,
        }
    }
}

fn source_port_refused(asked: Option<u16>) -> String {
    match asked {
        Some(port) => format!(
            "the source port {port} cannot be had: another program may use it, choose another --source-port"
        ),
        None => "no source port can be had".to_owned(),
    }
}

/// Gives the namespace back before the lock: whoever gets the lock finds it free.
fn leave(namespace: Namespace, lock: ControlLock) {
    drop(namespace);
    drop(lock);
    info!("ended");
}

impl Daemon {
    async fn serve(
        &mut self,
        listener: tokio::net::UnixListener,
        metrics: Option<Listener>,
        mut links: LinkWatch,
        mut incoming: mpsc::UnboundedReceiver<Event>,
        mut ended: mpsc::UnboundedReceiver<End>,
    ) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut restart = signal(SignalKind::user_defined1())?;
        let (_metrics, asked) = metrics.map(Server::start).transpose()?.unzip();
        // Without a server nobody asks.
        let mut asked = asked.unwrap_or_else(|| mpsc::channel(1).1);
        let (calls, mut called) = mpsc::channel(CALLS);
        let server_end = Arc::new(Notify::new());
        let ending = Arc::clone(&server_end);
        let mut serving = tokio::spawn(server::serve(
            listener,
            calls,
            async move { ending.notified().await },
            server::Limits::default(),
        ));
        let mut second = interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut quarter = interval(Duration::from_millis(250));
        quarter.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut devices = interval(DEVICES_PERIOD);
        devices.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut neighbours = interval(NEIGHBOURS_PERIOD);
        neighbours.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stop = Arc::clone(&self.stop);
        let hooks = self.hooks.clone();
        let mut beats = self.service.watchdog.map(|within| interval(within / 2));

        self.read_links(&links).await;
        self.settle().await;
        self.service.ready(self.status_line());
        loop {
            tokio::select! {
                () = beat(beats.as_mut()) => self.service.lives(),
                _ = terminate.recv() => { info!("SIGTERM: ending"); break }
                _ = restart.recv() => {
                    info!("SIGUSR1: ending, and what is redirected goes on");
                    self.keeps = true;
                    break
                }
                _ = interrupt.recv() => { info!("SIGINT: ending"); break }
                _ = hangup.recv() => { info!("SIGHUP: reloading"); self.reload().await }
                () = overdue(self.configuration.unconfirmed.as_ref().map(|load| load.until)) => {
                    warn!("nobody confirmed the load in time");
                    // There is one: its time is over.
                    let _ = self.roll_back().await;
                }
                () = stop.notified() => break,
                Some(call) = called.recv() => {
                    if matches!(call.request, Request::Stats(_) | Request::Status) {
                        self.read_devices().await;
                    }
                    self.answer(call).await;
                }
                Some(question) = asked.recv() => self.tell(question).await,
                Some(event) = incoming.recv() => self.take(event).await,
                Some(end) = ended.recv() => self.bury(end).await,
                _ = devices.tick() => self.read_devices().await,
                () = links.changed() => {
                    self.read_links(&links).await;
                    self.read_targets().await;
                }
                () = hooks_changed(hooks.as_deref()) => self.read_targets().await,
                () = self.neighbours.changed() => {}
                _ = neighbours.tick() => self.look_for_neighbours(true).await,
                _ = second.tick() => self.each_second(&links).await,
                _ = quarter.tick() => {
                    self.tell_subscribers();
                    if self.neighbours.is_stale() {
                        self.read_next_hops().await;
                    }
                    if self.queues_changed() {
                        self.read_links(&links).await;
                    }
                    if self.state.awaits_joins() {
                        self.take(Event::JoinsDue).await;
                    }
                }
            }
        }

        self.service.stopping();
        self.dismiss_subscribers();
        server_end.notify_one();
        // Calls that are under way are dropped, which answers that the daemon is ending.
        loop {
            tokio::select! {
                Some(call) = called.recv() => drop::<Call>(call),
                _ = &mut serving => break,
            }
        }
        self.take(Event::Stop { keep: self.keeps }).await;
        Ok(())
    }

    async fn each_second(&mut self, links: &LinkWatch) {
        self.end_hung_workers();
        self.check_ledger();
        self.clear_socket_errors();
        if self.journal_failure.is_some() || self.journal_is_old {
            self.remember();
        }
        let _ = self.tend_memberships();
        self.books.follow_redirected(&self.state, &self.programs);
        self.books.sample(&self.state);
        self.read_targets().await;
        if self.state.awaits_slot() {
            self.read_links(links).await;
        }
        self.read_next_hops().await;
        self.look_for_neighbours(false).await;
        if self.service.is_managed() {
            self.service.says(self.status_line());
        }
    }

    /// Answers whoever serves the metrics; one that waits no longer misses its answer, nothing else.
    async fn tell(&mut self, question: Question) {
        match question {
            Question::Alive(answer) => drop(answer.send(())),
            Question::Survey(answer) => {
                self.read_devices().await;
                self.read_packet_statistics();
                self.books.follow_redirected(&self.state, &self.programs);
                drop(answer.send(self.survey()));
            }
        }
    }

    /// Lets go of all that is to end with the daemon, and of nothing else.
    fn end(&mut self) {
        if self.keeps {
            self.remember();
            std::mem::take(&mut self.programs).into_values().for_each(Steering::keep);
        } else if let Err(error) = std::mem::take(&mut self.kept).release() {
            warn!(%error, "the holder of memberships cannot be ended");
        }
    }

    /// Has the memberships that are to outlive the daemon held.
    ///
    /// # Errors
    ///
    /// Why they would not; said in the log once.
    pub fn tend_memberships(&mut self) -> Result<(), String> {
        let failure = self.kept.tend().err().map(|error| error.to_string());
        if let Some(why) = failure.as_ref().filter(|_| failure != self.holder_failure) {
            warn!("memberships of redirected rules would end with the daemon: {why}");
        }
        self.holder_failure.clone_from(&failure);
        failure.map_or(Ok(()), Err)
    }

    /// Whether an interface that rules come in on has another number of RX queues: netlink does not tell.
    fn queues_changed(&self) -> bool {
        let inputs: BTreeSet<_> =
            self.state.rules().iter().map(|entry| &entry.rule.input.interface).collect();
        let mut links = inputs.into_iter().filter_map(|name| Some((name, self.state.links().get(name)?)));
        links.any(|(name, link)| ethtool::rx_queues(name).is_some_and(|queues| queues != link.rx_queues))
    }

    /// Takes note of what the kernel counted of the packet sockets.
    pub fn read_packet_statistics(&mut self) {
        for (id, ingress) in &mut self.packet_sockets {
            self.books.packets_counted(id, ingress.socket.statistics());
        }
    }

    /// Takes note of what the devices of the rules have lost.
    async fn read_devices(&mut self) {
        if let Err(error) = self.devices.read(&self.state).await {
            debug!(%error, "the counters of the devices cannot be read");
        }
    }

    /// Ends workers that give no sign of life; their ends have them restarted.
    fn end_hung_workers(&mut self) {
        for (id, worker) in &mut self.workers {
            let relays =
                self.state.workers().get(id).is_some_and(|running| running.steered && !running.failed);
            if relays && worker.hangs(self.books.worker_enters(id)) {
                warn!(worker = %id, "{}", worker_process::HUNG);
                worker.kill();
            }
        }
    }

    fn clear_socket_errors(&self) {
        self.packet_sockets.values().for_each(|ingress| ingress.socket.clear_error());
    }

    async fn read_links(&mut self, watch: &LinkWatch) {
        match watch.snapshot().await {
            Ok(links) => {
                if links != *self.state.links() {
                    self.log_changes(&links);
                    self.clear_socket_errors();
                    self.apply(Event::Links(links));
                    // Another interface may have the name of one that took redirected frames.
                    let targets = self.ask_targets();
                    self.take(Event::Targets(targets)).await;
                    self.tell_subscribers();
                }
            }
            Err(error) => warn!(%error, "the interfaces cannot be read; trying again when they change"),
        }
    }

    /// Reads where the hosts of outputs are found, if that may have changed.
    async fn read_next_hops(&mut self) {
        let hosts = self.state.hosts();
        let former = self.state.next_hops();
        let known = hosts.iter().eq(former.keys()) && !former.values().any(NextHop::is_unresolved);
        if known && (hosts.is_empty() || !self.neighbours.is_stale()) {
            return;
        }
        if let Some(next_hops) = self.ask_next_hops(&hosts).await {
            self.take(Event::NextHops(next_hops)).await;
        }
    }

    /// Where hosts are found, if it is not as it was.
    async fn ask_next_hops(&mut self, hosts: &BTreeSet<Host>) -> Option<NextHops> {
        let former = self.state.next_hops();
        match self.neighbours.next_hops(hosts, former).await {
            Ok(next_hops) if next_hops != *former => {
                log_neighbours(former, &next_hops);
                Some(next_hops)
            }
            Ok(_) => None,
            Err(error) => {
                warn!(%error, "the neighbours cannot be read; trying again within a second");
                None
            }
        }
    }

    /// Has the kernel look for the neighbours whose MAC it does not know, before and while they are sent to, or see
    /// to `all`.
    async fn look_for_neighbours(&self, all: bool) {
        if (all || self.state.next_hops().values().any(NextHop::is_unresolved))
            && let Err(error) = self.neighbours.look_for(all).await
        {
            debug!(%error, "not all neighbours can be looked for");
        }
    }

    /// Says what has changed of the interfaces that rules name.
    fn log_changes(&self, now: &Links) {
        let before = self.state.links();
        for interface in self.state.rules().interfaces() {
            match (before.get(interface), now.get(interface)) {
                (Some(_), None) => warn!(%interface, "interface is gone"),
                (None, Some(_)) => info!(%interface, "interface is there"),
                (Some(before), Some(now)) if before.index != now.index => {
                    info!(%interface, "interface was made anew");
                }
                (Some(before), Some(now)) if before.up != now.up && now.up => {
                    info!(%interface, "interface is up");
                }
                (Some(before), Some(now)) if before.up != now.up => warn!(%interface, "interface is down"),
                (Some(before), Some(now)) if before.addresses != now.addresses => {
                    info!(%interface, addresses = ?now.addresses, "addresses changed");
                }
                (Some(before), Some(now)) if before.mtu != now.mtu => {
                    info!(%interface, mtu = now.mtu, "MTU changed");
                }
                (Some(before), Some(now)) if before.rx_queues != now.rx_queues => {
                    info!(%interface, queues = now.rx_queues, "number of RX queues changed");
                }
                _ => {}
            }
        }
    }

    /// Takes an event in and does what follows from it.
    async fn take(&mut self, event: Event) {
        for effect in self.apply(event) {
            if let Err(failure) = self.execute(&effect).await {
                error!(?effect, ?failure, "failed");
            }
        }
        self.settle().await;
    }

    /// Takes an event in alone.
    fn apply(&mut self, event: Event) -> Vec<Effect> {
        if matches!(event, Event::Links(_) | Event::NextHops(_)) {
            // What outputs missed until now has the reason of until now.
            self.books.follow_redirected(&self.state, &self.programs);
        }
        self.state.apply(event)
    }

    /// Accounts for a worker that has ended, unless it was to end: another may have its id by now.
    async fn bury(&mut self, End { id, pid, why, lived }: End) {
        if pid.is_some() && self.workers.get(&id).map(|worker| worker.pid) != pid {
            return;
        }
        let last_words = self.workers.remove(&id).and_then(|mut worker| worker.last_words());
        let why = last_words.unwrap_or(why);
        error!(worker = %id, why, "worker ended; it is restarted");
        self.steer_away(&id).await;
        if let Some(running) = self.state.workers().get(&id) {
            self.books.worker_died(&id, running, &self.programs);
        }
        self.take(Event::WorkerExited { id, why, lived }).await;
        self.tell_subscribers();
    }

    /// Does what is planned until nothing is.
    pub async fn settle(&mut self) {
        let known = &self.state.targets().refusals;
        if self.state.has_bpf()
            && self.state.egress_interfaces().iter().any(|name| !known.contains_key(*name))
        {
            // What rules newly send from is asked before it is decided how they do.
            let targets = self.ask_targets();
            self.state.apply(Event::Targets(targets));
        }
        let hosts = self.state.hosts();
        if hosts.iter().any(|host| !self.state.next_hops().contains_key(host)) {
            // And where the hosts are that rules newly send to.
            if let Some(next_hops) = self.ask_next_hops(&hosts).await {
                self.apply(Event::NextHops(next_hops));
            }
            self.look_for_neighbours(false).await;
        }
        loop {
            let plan = self.state.plan();
            if plan.is_empty() {
                self.warn_of_fallbacks();
                self.say_moves();
                let _ = self.tend_memberships();
                if self.devices.awaits(&self.state) {
                    self.read_devices().await;
                }
                return;
            }
            for effect in plan {
                debug!(?effect, "doing");
                match self.execute(&effect).await {
                    Ok(()) => self.state.done(&effect),
                    Err(failure) => {
                        let (Failure::Refused(why) | Failure::Worker { why, .. }) = &failure;
                        // What keeps XDP away is said to who asked for it, and once where it was `auto`.
                        let said = matches!(effect, Effect::Attach { .. });
                        if !said && !self.state.knows_refusal(&effect, why) {
                            warn!("{why}");
                        }
                        self.state.failed(&effect, failure);
                        // Nothing else in a plan depends on a membership.
                        if !matches!(effect, Effect::Join(_)) {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Says once that `auto` takes AF_PACKET on an interface, until it has taken AF_XDP there.
    fn warn_of_fallbacks(&mut self) {
        let by_auto = |entry: &&Entry| entry.rule.datapath == DatapathChoice(None);
        let rules = self.state.rules().iter().filter(by_auto).map(|entry| &entry.rule);
        let served = |rule: &&Rule| self.state.serves(&rule.input.interface, Datapath::AfPacket);
        let by_packet = |rule: &&Rule| self.state.datapath_of(rule) == Datapath::AfPacket;
        let fallen: BTreeSet<_> =
            rules.filter(by_packet).filter(served).map(|rule| rule.input.interface.clone()).collect();
        for interface in fallen.difference(&self.fallbacks).filter(|_| self.state.has_bpf()) {
            let why = self.state.no_xdp(interface).unwrap_or_default();
            warn!("rules with --datapath auto on {interface} go by af-packet: {why}");
        }
        let by_xdp = |name: &InterfaceName| self.state.serves(name, Datapath::AfXdp);
        self.fallbacks.retain(|name| !by_xdp(name));
        self.fallbacks.extend(fallen);
    }

    /// Says which rules have come to another datapath, by themselves or by command.
    fn say_moves(&mut self) {
        let mut served = BTreeMap::new();
        for entry in self.state.rules().iter() {
            let (name, rule) = (&entry.rule.name, &entry.rule);
            let before = self.served.get(name).copied();
            let Some(now) = self.served_by(rule).or(before) else { continue };
            if let Some(before) = before.filter(|before| *before != now) {
                info!(rule = %name, from = %before, to = %now, "rule moved: {}", self.rule_why(rule, now));
            }
            served.insert(name.clone(), now);
        }
        self.served = served;
    }

    /// Carries out one effect.
    async fn execute(&mut self, effect: &Effect) -> Result<(), Failure> {
        match effect {
            Effect::Prepare { interface } => self.prepare(interface).map_err(Failure::Refused),
            Effect::Attach { interface } => self.attach(interface).map_err(Failure::Refused),
            Effect::OpenFanout { interface, fanout } => {
                self.open_fanout(interface, *fanout).map_err(Failure::Refused)
            }
            Effect::Detach { interface } => {
                self.read_packet_statistics();
                self.packet_sockets.retain(|id, _| {
                    let stays = id.interface != *interface;
                    if !stays {
                        self.books.packet_socket_ends(id);
                    }
                    stays
                });
                self.books.program_ends(interface, &self.state, &self.programs);
                self.programs.remove(interface);
                self.journal_is_old = true;
                Ok(())
            }
            Effect::StartWorker { id, spec } => self.start_worker(id, spec).await,
            Effect::Steer { id } => self.steer(id).await,
            Effect::StopWorker { id } => {
                self.steer_away(id).await;
                if let Some(mut worker) = self.workers.remove(id) {
                    worker.drain().await;
                }
                if let Some(running) = self.state.workers().get(id) {
                    self.books.worker_died(id, running, &self.programs);
                }
                Ok(())
            }
            Effect::RestartAfter { id, delay } => {
                let (id, delay, events) = (id.clone(), *delay, self.events.clone());
                tokio::spawn(async move {
                    sleep(delay).await;
                    let _ = events.send(Event::RestartDue { id });
                });
                Ok(())
            }
            Effect::SetOutputs { interface, rules } => {
                self.journal_is_old = true;
                for (slot, _) in rules {
                    self.books.redirects(*slot, self.programs.get(interface));
                }
                self.set_outputs(interface, rules)
            }
            Effect::DropOutputs { interface, rules } => {
                let rules: Vec<_> = rules.iter().map(|slot| (*slot, Vec::new())).collect();
                self.set_outputs(interface, &rules)
            }
            Effect::SetFlow { interface, key, value } => match self.programs.get_mut(interface) {
                Some(program) => program.set_flow(key, *value).map_err(|error| refused(&error)),
                // Without eBPF a worker's filter follows its rules.
                None => Ok(()),
            },
            Effect::DeleteFlow { interface, key } => match self.programs.get_mut(interface) {
                Some(program) => program.delete_flow(key).map_err(|error| refused(&error)),
                None => Ok(()),
            },
            Effect::Barrier => {
                barrier().await;
                Ok(())
            }
            Effect::Join(Joined { membership, outlives }) => self
                .memberships_that(*outlives)
                .join(*membership)
                .map_err(|error| Failure::Refused(join_refused(membership, &error))),
            Effect::Leave(Joined { membership, outlives }) => {
                let left = self.memberships_that(*outlives).leave(*membership);
                left.map_err(|error| refused(&error))
            }
            Effect::OpenEgress { id, .. }
            | Effect::CloseEgress { id, .. }
            | Effect::UpsertRule { id, .. }
            | Effect::RemoveRule { id, .. } => self.tell_worker(id, effect).await,
        }
    }

    fn memberships_that(&mut self, outlive: bool) -> &mut Memberships {
        if outlive { &mut self.kept } else { &mut self.memberships }
    }

    /// Has the kernel send rules' datagrams on to these outputs.
    fn set_outputs(
        &mut self,
        interface: &InterfaceName,
        rules: &[(RuleSlot, Vec<RedirectOutput>)],
    ) -> Result<(), Failure> {
        let Some(program) = self.programs.get_mut(interface) else { return Ok(()) };
        program.set_outputs(rules).map_err(|error| refused(&error))
    }

    /// Asks the kernel which of the interfaces that rules send from take redirected frames.
    async fn read_targets(&mut self) {
        let targets = self.ask_targets();
        if targets != *self.state.targets() {
            self.take(Event::Targets(targets)).await;
        }
    }

    /// Why the kernel cannot send rules on by itself that name this datapath, asked before any of them is moved there: a
    /// change that is refused costs a stream nothing.
    pub fn redirect_refusal<'a>(
        &self,
        rules: impl Iterator<Item = &'a Rule>,
    ) -> Option<(&'a RuleName, String)> {
        let named: Vec<_> = rules.filter(|rule| rule.datapath.0 == Some(Datapath::Redirect)).collect();
        if named.is_empty() {
            return None;
        }
        let egress = named.iter().flat_map(|rule| &rule.outputs).map(|output| &output.interface);
        let targets = self.ask_targets_of(egress.collect());
        named.into_iter().find_map(|rule| Some((&rule.name, self.state.redirect_refusal(rule, &targets)?)))
    }

    fn ask_targets(&self) -> Targets {
        self.ask_targets_of(self.state.egress_interfaces())
    }

    fn ask_targets_of(&self, egress: BTreeSet<&InterfaceName>) -> Targets {
        if !self.state.has_bpf() {
            return Targets::default();
        }
        let links = self.state.links();
        let there: Vec<_> =
            egress.into_iter().filter_map(|name| Some((name.clone(), links.get(name)?.index))).collect();
        let refusal = |(name, index): &(InterfaceName, IfIndex)| {
            let refusal = takes_redirects(name, *index, &links[name].kind).err();
            // One that has just gone waits, which is no reason for its rules to move.
            let refusal = refusal.filter(|error| !error.is_gone());
            (name.clone(), refusal.map(|error| one_line(&error)))
        };
        let refusals = there.iter().map(refusal).collect();
        let hooks = self.hooks.as_ref().map(|hooks| hooks.read(&there)).unwrap_or_default();
        let queues = there.into_iter().filter_map(|(name, _)| Some((name.clone(), ethtool::tx_ring(&name)?)));
        Targets { refusals, hooks, queues: queues.collect() }
    }

    pub fn placement<'a>(&self, interface: &'a InterfaceName) -> Result<Placement<'a>, String> {
        let link = self.state.links().get(interface).ok_or_else(|| format!("{interface} does not exist"))?;
        Ok(Placement {
            interface,
            index: link.index,
            kind: link.kind.clone(),
            mtu: link.mtu,
            queues: link.rx_queues.max(af_xdp::MAX_QUEUES),
            max_rules: self.settings.max_rules,
            pins: self.pins.join(interface.as_str()),
            occupant: link.xdp_program,
        })
    }

    /// Makes an interface's maps, where there is eBPF.
    fn prepare(&mut self, interface: &InterfaceName) -> Result<(), String> {
        if self.state.has_bpf() {
            let placement = self.placement(interface)?;
            let program = Steering::prepare(&self.object, &placement).map_err(|error| one_line(&error))?;
            self.programs.insert(interface.clone(), program);
        }
        Ok(())
    }

    fn attach(&mut self, interface: &InterfaceName) -> Result<(), String> {
        let placement = self.placement(interface)?;
        if self.formers.contains_key(interface) {
            self.remember();
        }
        let program = self.programs.get_mut(interface).ok_or_else(|| format!("{interface} has no maps"))?;
        program.attach(&placement, self.settings.generic_xdp).map_err(|error| one_line(&error))?;
        let mode = if program.is_generic() { "generic XDP attached" } else { "native XDP attached" };
        info!(%interface, kind = placement.kind, "{mode}");
        follow_log(interface, program);
        if self.end_former(interface) {
            self.remember();
            ebpf::clear_former(&placement.pins);
        }
        Ok(())
    }

    /// Opens the packet sockets of an interface's workers.
    fn open_fanout(&mut self, interface: &InterfaceName, fanout: Fanout) -> Result<(), String> {
        let failed = |error: &dyn std::error::Error| {
            format!("no packet socket can be opened on {interface}: {}", one_line(error))
        };
        let index = self.placement(interface)?.index;
        let Fanout { sockets, ring } = fanout;
        let group = PacketSocket::open_group(index, sockets, ring).map_err(|error| failed(&error))?;
        if let Some(program) = self.programs.get_mut(interface) {
            let filter = program.filter().map_err(|error| failed(&error))?;
            group
                .iter()
                .try_for_each(|socket| socket.attach_filter(filter))
                .map_err(|error| failed(&error))?;
        }
        for (index, socket) in (0..).zip(group) {
            let id = WorkerId { interface: interface.clone(), datapath: Datapath::AfPacket, index };
            let base = self.books.worker_received(&id);
            self.packet_sockets.insert(id, PacketIngress { socket, ring, base });
        }
        info!(%interface, sockets, "packet sockets opened");
        Ok(())
    }

    /// Starts a worker and takes its sockets.
    async fn start_worker(&mut self, id: &WorkerId, spec: &WorkerSpec) -> Result<(), Failure> {
        let mut worker = match WorkerProcess::spawn(id, self.ends.clone()) {
            Ok(worker) => worker,
            Err(error) => return Err(self.worker_failed(id, &one_line(&error))),
        };
        let sockets = match self.setup(id, spec) {
            Ok((setup, fds)) => {
                let fds: Vec<_> = fds.iter().collect();
                worker.set_up(setup, &fds).await.map_err(|error| one_line(&error))
            }
            Err(why) => Err(why),
        };
        let pid = worker.pid;
        let worker = self.workers.entry(id.clone()).insert_entry(worker).into_mut();
        match sockets {
            Ok(sockets) if sockets.len() == spec.source.queues().len() => {
                self.books.serves(id, spec.source.queues());
                worker.hold(spec.source.queues().iter().copied().map(QueueId).zip(sockets).collect());
                info!(worker = %id, pid, queues = ?spec.source.queues(), cpu = spec.cpu, "worker started");
                Ok(())
            }
            Ok(_) => Err(self.worker_failed(id, "it did not hand up its sockets")),
            Err(why) => Err(self.worker_failed(id, &why)),
        }
    }

    /// What a worker is made of, and the descriptors that go with it.
    fn setup(&mut self, id: &WorkerId, spec: &WorkerSpec) -> Result<(Setup, Vec<OwnedFd>), String> {
        let ledger = self.books.ledger(id).and_then(OwnedFd::try_clone);
        let mut fds = vec![ledger.map_err(|error| format!("it has no ledger: {error}"))?];
        let ingress = match &spec.source {
            FrameSource::AfXdp { queues, chunk_bytes } => Ingress::AfXdp {
                interface: id.interface.as_str().to_owned(),
                queues: queues.clone(),
                umem: UmemShape {
                    chunk_bytes: *chunk_bytes,
                    frames: self.settings.frames,
                    rx_ring: self.settings.rx_ring.unwrap_or(self.settings.frames),
                },
            },
            FrameSource::AfPacket => {
                let PacketIngress { socket, ring, base } =
                    self.packet_sockets.get(id).ok_or("it has no packet socket")?;
                let socket = socket.duplicate();
                fds.push(
                    socket.map_err(|error| format!("its packet socket cannot be handed down: {error}"))?,
                );
                let taken = self.books.worker_received(id) - base;
                Ingress::AfPacket { ring: *ring, taken, classic: !self.state.has_bpf() }
            }
        };
        let log_level = self.settings.log_level.as_str().to_owned();
        let busy_poll_us = self.settings.busy_poll_us;
        Ok((Setup { ingress, cpu: spec.cpu, busy_poll_us, layout: self.books.layout(), log_level }, fds))
    }

    /// Ends a worker that is of no use; the end of its process, or this if there is none, has it restarted.
    fn worker_failed(&mut self, id: &WorkerId, why: &str) -> Failure {
        if let Some(worker) = self.workers.get(id) {
            worker.kill();
        } else {
            let end = End { id: id.clone(), pid: None, why: why.to_owned(), lived: Duration::ZERO };
            // Without a receiver the daemon itself is ending.
            let _ = self.ends.send(end);
        }
        Failure::Worker { id: id.clone(), why: format!("worker {id}: {why}") }
    }

    /// Steers frames to a worker that has its rules.
    async fn steer(&mut self, id: &WorkerId) -> Result<(), Failure> {
        let Some(worker) = self.workers.get_mut(id) else {
            return Err(self.worker_failed(id, "it has ended"));
        };
        let (begun, sockets) = (worker.begin().await, worker.take_sockets());
        begun.map_err(|error| self.worker_failed(id, &one_line(&error)))?;
        for (queue, socket) in sockets {
            let set = match self.programs.get_mut(&id.interface) {
                Some(program) => program.set_socket(queue, socket.as_fd()).map_err(|error| one_line(&error)),
                None => Err(format!("{} has no program", id.interface)),
            };
            set.map_err(|why| self.worker_failed(id, &why))?;
        }
        info!(worker = %id, "worker relays");
        Ok(())
    }

    /// Steers nothing to a worker any more.
    async fn steer_away(&mut self, id: &WorkerId) {
        let spec = self.state.workers().get(id).and_then(|running| running.spec.as_ref());
        let Some(FrameSource::AfXdp { queues, .. }) = spec.map(|spec| spec.source.clone()) else { return };
        let Some(program) = self.programs.get_mut(&id.interface) else { return };
        for queue in queues {
            if let Err(error) = program.clear_socket(QueueId(queue)) {
                warn!(worker = %id, queue, error = one_line(&error), "frames may still be steered to a worker that ends");
            }
        }
        barrier().await;
    }

    /// Tells a worker something, and ends it if it does not obey.
    async fn tell_worker(&mut self, id: &WorkerId, effect: &Effect) -> Result<(), Failure> {
        let egress = match effect {
            Effect::OpenEgress { key, .. } => Some(egress_socket::open(key).map_err(|error| {
                let (interface, port) = (&key.interface, key.source_port);
                Failure::Refused(format!("no socket can send from {interface} port {port}: {error}"))
            })?),
            _ => None,
        };
        let Some(worker) = self.workers.get_mut(id) else {
            return Err(self.worker_failed(id, "it has ended"));
        };
        let told = match (effect, &egress) {
            (Effect::OpenEgress { socket, .. }, Some(egress)) => worker.open_egress(*socket, egress).await,
            (Effect::CloseEgress { socket, .. }, _) => worker.close_egress(*socket).await,
            (Effect::UpsertRule { rule, .. }, _) => worker.upsert(rule.clone()).await,
            (Effect::RemoveRule { slot, .. }, _) => worker.remove(slot.0).await,
            _ => Ok(()),
        };
        told.map_err(|error| self.worker_failed(id, &one_line(&error)))
    }
}

/// Passes on what the XDP program logs, if it was built to.
pub fn follow_log(interface: &InterfaceName, program: &mut Steering) {
    let Some(mut logger) = program.logger() else { return };
    info!(%interface, "the XDP program logs");
    tokio::spawn(async move {
        loop {
            logger.flush();
            sleep(Duration::from_millis(100)).await;
        }
    });
}

/// Says which neighbours answer no more, and which do again.
fn log_neighbours(before: &NextHops, now: &NextHops) {
    let failed = |hop: Option<&NextHop>| matches!(hop, Some(NextHop::Neighbour(found)) if found.failed);
    for (key, hop) in now {
        let NextHop::Neighbour(neighbour) = hop else { continue };
        let (host, address) = (key.address, neighbour.address);
        match (failed(before.get(key)), neighbour.failed) {
            (false, true) => warn!(%host, neighbour = %address, "neighbour does not answer ARP"),
            (true, false) => info!(%host, neighbour = %address, "neighbour answers again"),
            _ => {}
        }
    }
}

fn refused(error: &dyn std::error::Error) -> Failure {
    Failure::Refused(one_line(error))
}

fn join_refused(Membership { group, source, .. }: &Membership, error: &io::Error) -> String {
    let source = source.map(|source| format!(" of source {source}")).unwrap_or_default();
    let full = error.raw_os_error() == Some(libc::ENOBUFS);
    let advice = if full { "; see `sysctl net.ipv4.igmp_max_memberships`" } else { "" };
    format!("the group {group}{source} cannot be joined: {error}{advice}")
}

/// Returns when what redirected frames would pass by may have changed.
async fn hooks_changed(hooks: Option<&EgressHooks>) {
    match hooks {
        Some(hooks) => hooks.changed().await,
        None => std::future::pending().await,
    }
}

/// Returns when the service manager is to be shown that this loop does not hang.
async fn beat(beats: Option<&mut Interval>) {
    match beats {
        Some(beats) => drop(beats.tick().await),
        None => std::future::pending().await,
    }
}

/// Waits until all programs are through that might act on a deleted flow.
async fn barrier() {
    // Longer than any softirq may run before it is pushed back.
    const GRACE: Duration = Duration::from_millis(100);
    if let Err(error) = ebpf::barrier() {
        debug!(%error, "membarrier is not to be had; waiting instead");
        sleep(GRACE).await;
    }
}

/// An error with its causes, in one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}
