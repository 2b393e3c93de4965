//! IPsec policies for what is sent.

use std::io;

use super::nftables::is_absent;
use crate::sys::netlink::{bytes, dump};

const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_POLICY_OUT: u8 = 1;
/// Length of `xfrm_userpolicy_id`.
const POLICY_ID: usize = 64;
/// Offsets in `xfrm_userpolicy_info`.
const FAMILY: usize = 40;
const DIRECTION: usize = 160;

/// What there is, if there is any. None if the kernel has no IPsec.
pub(super) fn policies() -> io::Result<Option<String>> {
    let found = dump(libc::NETLINK_XFRM, XFRM_MSG_GETPOLICY, &[0; POLICY_ID], 1, read);
    match found {
        Ok(found) => {
            Ok(found.first().map(|()| "IPsec has a policy for what is sent (ip xfrm policy)".to_owned()))
        }
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read(policy: &[u8]) -> Option<()> {
    let family = u16::from_ne_bytes(bytes(policy, FAMILY)?);
    let [direction] = bytes(policy, DIRECTION)?;
    (direction == XFRM_POLICY_OUT && i32::from(family) != libc::AF_INET6).then_some(())
}
