//! What the supervisor knows of and does to the network: interfaces, neighbours, memberships, egress sockets.

use futures_util::{FutureExt, Stream, StreamExt};

pub mod egress_hooks;
pub mod egress_socket;
pub mod joined;
pub mod links;
pub mod losses;
pub mod membership;
pub mod neighbours;
pub mod packet_socket;
pub mod redirect_target;

/// Netlink's word that something has changed.
type Changes = Box<dyn Stream<Item = ()> + Unpin>;

/// Returns when something has changed since it was last called.
async fn next(changes: &mut Changes) {
    if changes.next().await.is_none() {
        // The connection is gone, which only the end of the runtime does.
        std::future::pending::<()>().await;
    }
    // One change comes as several messages.
    while let Some(Some(())) = changes.next().now_or_never() {}
}
