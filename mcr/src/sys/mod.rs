//! The system calls that no library of ours wraps, thin.

mod bpf;
pub mod bpf_object;
pub mod bpf_query;
pub mod channel;
pub mod cpu_list;
pub mod ethtool;
pub mod inherited;
pub mod map_batch;
pub mod multicast;
pub mod netdev;
pub mod netlink;
pub mod packet_tap;
pub mod privileges;
pub mod seccomp;
pub mod service_manager;
pub mod socket_option;
pub mod whole_file;
