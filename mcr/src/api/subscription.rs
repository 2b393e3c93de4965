//! A subscription: lines that a connection writes without being asked for each. What its client has not read yet is
//! bounded, and whoever tells never waits.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Bytes that may wait for a client: what many thousand rules have to tell at once.
pub const BACKLOG_BYTES: u32 = 8 * 1024 * 1024;

/// Whole lines.
pub type Lines = Arc<[u8]>;

/// The end of who tells.
#[derive(Debug)]
pub struct Subscriber {
    queue: mpsc::UnboundedSender<Told>,
    room: Arc<Semaphore>,
}

/// The end of the connection.
#[derive(Debug)]
pub struct Subscription(mpsc::UnboundedReceiver<Told>);

/// Takes its room until it is dropped.
#[derive(Debug)]
pub struct Told {
    pub lines: Lines,
    _room: Option<OwnedSemaphorePermit>,
}

pub fn pair(backlog_bytes: u32) -> (Subscriber, Subscription) {
    let (queue, told) = mpsc::unbounded_channel();
    (Subscriber { queue, room: Arc::new(Semaphore::new(backlog_bytes as usize)) }, Subscription(told))
}

impl Subscriber {
    /// Whether there is nobody to be told any more.
    pub fn is_gone(&self) -> bool {
        self.queue.is_closed()
    }

    /// Has lines written. False if the client is too far behind: it has `farewell` as the last that it is told.
    pub fn tell(&self, lines: &Lines, farewell: &Lines) -> bool {
        let bytes = u32::try_from(lines.len()).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(bytes).ok();
        let fits = room.is_some();
        let lines = Arc::clone(if fits { lines } else { farewell });
        // Whoever has gone misses nothing.
        let _ = self.queue.send(Told { lines, _room: room });
        fits
    }
}

impl Subscription {
    /// The next lines, or none when there will be no more.
    pub async fn next(&mut self) -> Option<Told> {
        self.0.recv().await
    }

    /// Whether all has been told.
    pub fn is_over(&self) -> bool {
        self.0.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Lines {
        text.as_bytes().into()
    }

    #[test]
    fn who_falls_behind_is_told_so_last() {
        let (subscriber, mut subscription) = pair(10);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut read = || runtime.block_on(subscription.next()).map(|told| told.lines.to_vec());
        let farewell = lines("bye\n");
        assert!(subscriber.tell(&lines("1234\n"), &farewell));
        assert!(subscriber.tell(&lines("5678\n"), &farewell));
        // What has been read makes room.
        assert_eq!(read().as_deref(), Some(&b"1234\n"[..]));
        assert!(subscriber.tell(&lines("9\n"), &farewell));
        assert!(!subscriber.tell(&lines("abcd\n"), &farewell));
        drop(subscriber);
        let rest: Vec<_> = std::iter::from_fn(read).flatten().collect();
        assert_eq!(rest, b"5678\n9\nbye\n");
        assert!(subscription.is_over());
    }

    #[test]
    fn a_client_that_has_gone_is_known() {
        let (subscriber, subscription) = pair(10);
        assert!(!subscriber.is_gone());
        drop(subscription);
        assert!(subscriber.is_gone());
        assert!(subscriber.tell(&lines("1\n"), &lines("bye\n")));
    }
}
