//! Reads from a client: bytes, and the descriptors that come with them.
//!
//! A descriptor arrives with the bytes of its request, or earlier (unix(7): `SCM_RIGHTS`). So a request takes the first
//! descriptor that has not been taken, and a descriptor that is left when all received bytes are handled belongs to no
//! request.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use crate::client_file::{Descriptor, DescriptorBudget};

/// The number of descriptors in one message, at most.
const MAX_IN_MESSAGE: usize = 4;
/// The number of descriptors that the buffer for [`MAX_IN_MESSAGE`] may hold, because it is aligned.
const MAX_RECEIVED: usize = 2 * MAX_IN_MESSAGE;
/// The number of received descriptors that no request has taken, at most.
const MAX_WAITING: usize = 16;

/// The reading half of a client's connection.
pub struct Receiver {
    stream: OwnedReadHalf,
    user: u32,
    budget: Arc<DescriptorBudget>,
    descriptors: VecDeque<Descriptor>,
}

impl Receiver {
    /// Returns the receiver of that connection, whose client is that user.
    pub fn new(stream: OwnedReadHalf, user: u32, budget: Arc<DescriptorBudget>) -> Self {
        Receiver { stream, user, budget, descriptors: VecDeque::new() }
    }

    /// Returns the connection.
    pub fn stream(&self) -> &UnixStream {
        self.stream.as_ref()
    }

    /// Takes the first descriptor that no request has taken.
    pub fn take_descriptor(&mut self) -> Option<Descriptor> {
        self.descriptors.pop_front()
    }

    /// Closes all descriptors that no request has taken.
    pub fn close_descriptors(&mut self) {
        self.descriptors.clear();
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Without a permit there is no space, and the kernel closes what arrives.
        let mut permits = self.budget.permits(self.user, MAX_RECEIVED).unwrap_or_default();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_IN_MESSAGE))];
        let mut ancillary =
            RecvAncillaryBuffer::new(if permits.is_empty() { &mut [] } else { &mut space[..] });
        let stream = self.stream.as_ref();
        let received = stream.try_io(Interest::READABLE, || {
            let mut buffers = [IoSliceMut::new(buffer)];
            Ok(recvmsg(stream, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?)
        })?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                for descriptor in descriptors {
                    let Some(permit) = permits.pop() else { return Err(too_many()) };
                    self.descriptors.push_back(Descriptor::new(descriptor, permit));
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > MAX_WAITING {
            self.close_descriptors();
            return Err(too_many());
        }
        Ok(received.bytes)
    }
}

fn too_many() -> io::Error {
    io::Error::new(io::ErrorKind::QuotaExceeded, "a client has passed too many descriptors")
}

impl AsyncRead for Receiver {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.as_ref().poll_read_ready(context))?;
            match self.receive(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use tokio::io::AsyncReadExt;

    fn pair() -> (Receiver, UnixStream, Arc<DescriptorBudget>) {
        let (own, client) = UnixStream::pair().unwrap();
        let budget = Arc::new(DescriptorBudget::default());
        (Receiver::new(own.into_split().0, 7, Arc::clone(&budget)), client, budget)
    }

    fn send(client: &UnixStream, bytes: &[u8], count: usize) {
        let file = tempfile::tempfile().unwrap();
        let descriptors = vec![file.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if count > 0 {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        }
        sendmsg(client, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_bytes_in_order() {
        let (mut receiver, client, budget) = pair();
        send(&client, b"one", 0);
        send(&client, b"two", 2);
        send(&client, b"three", 1);
        let mut text = [0; 11];
        receiver.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"onetwothree");
        assert_eq!(receiver.descriptors.len(), 3);
        assert!(receiver.take_descriptor().unwrap().checked().await.is_ok());
        drop(receiver);
        // A descriptor is closed on another thread.
        while budget.permits(7, 512).is_none() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn connection_fails_when_a_client_passes_too_many_descriptors() {
        let (mut receiver, client, _budget) = pair();
        send(&client, b"x", 64);
        let error = receiver.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert!(receiver.descriptors.is_empty());
    }

    #[tokio::test]
    async fn connection_fails_when_its_user_holds_too_many_descriptors() {
        let (mut receiver, client, budget) = pair();
        let _held = budget.permits(7, 510).unwrap();
        send(&client, b"x", 1);
        assert!(receiver.read(&mut [0; 8]).await.is_err());
        send(&client, b"y", 0);
        assert_eq!(receiver.read(&mut [0; 8]).await.unwrap(), 1);
    }
}
