//! Receiving from a packet socket with what the kernel tells beside a frame: its length, and its VLAN tag.

use std::{io, mem::zeroed, os::fd::AsRawFd};

use super::socket_option;

/// A frame, of which the beginning is in the buffer that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tapped {
    /// Bytes in the buffer.
    pub captured: usize,
    /// Bytes of the whole frame.
    pub length: usize,
    /// VLAN that the frame was tagged with: the kernel takes the tag out of the bytes.
    pub vlan: Option<u16>,
}

/// Room for one control message with a `tpacket_auxdata`, aligned as the kernel wants it.
type Control = [u64; 8];

/// Has the kernel tell it; without, [`receive`] knows of no tags and no lengths beyond the buffer.
pub fn enable(socket: &impl AsRawFd) -> io::Result<()> {
    socket_option::set(socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1)
}

/// The next frame, if there is one: the call does not wait.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Tapped> {
    let mut control: Control = [0; 8];
    let mut bytes = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeroes is a msghdr.
    let mut message = unsafe { zeroed::<libc::msghdr>() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the kernel writes into the buffer and the control room at most what is said to be there.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
    let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut tapped = Tapped { captured: length.min(buffer.len()), length, vlan: None };
    // SAFETY: the message is as the kernel has completed it.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: the header is null, or lies whole in the control room.
    if let Some(header) = unsafe { header.as_ref() }
        && (header.cmsg_level, header.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA)
    {
        // SAFETY: the data of this message is a tpacket_auxdata, of which any bit pattern is a value.
        let told = unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
        tapped.length = told.tp_len as usize;
        tapped.captured = tapped.captured.min(told.tp_snaplen as usize);
        tapped.vlan = (told.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(told.tp_vlan_tci & 0xfff);
    }
    Ok(tapped)
}
