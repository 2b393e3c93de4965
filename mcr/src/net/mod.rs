//! What the supervisor knows of and does to the network: interfaces, memberships, egress sockets.

pub mod egress_socket;
pub mod links;
pub mod membership;
pub mod packet_socket;
pub mod redirect_target;
