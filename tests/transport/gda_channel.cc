// Channels over software NICs: what holds for every kind of channel, and what the NIC may do to it.
#include "gda_harness.h"

#include <string>
#include <thread>
#include <vector>

#include "wording.h"

namespace lamina::gda_test {
namespace {

std::uint64_t SizeOf(int message, std::uint64_t slot_bytes) {
  return static_cast<std::uint64_t>(message) * 37 % (slot_bytes + 1);
}

void SendMany(Half& half, int count, std::uint64_t slot_bytes, std::uint64_t seed = 0) {
  std::vector<char> data(slot_bytes);
  for (int i = 0; i < count && half.record.reason == 0; ++i) {
    const std::uint64_t bytes = SizeOf(i, slot_bytes);
    Fill(data.data(), bytes, seed + static_cast<std::uint64_t>(i));
    SendOne(half, {{i, 1, 0}}, {{data.data(), bytes}});
  }
}

void RecvMany(Half& half, int count, std::uint64_t slot_bytes, std::uint64_t seed = 0) {
  std::vector<char> data(slot_bytes), expected(slot_bytes);
  for (int i = 0; i < count; ++i) {
    const std::uint64_t bytes = SizeOf(i, slot_bytes);
    RecvOne(half, {{i, 1, 0}}, {{data.data(), bytes}});
    if (half.record.reason != 0) return;
    Fill(expected.data(), bytes, seed + static_cast<std::uint64_t>(i));
    if (std::memcmp(data.data(), expected.data(), bytes) != 0) {
      Check(false, "message " + std::to_string(i) + " arrived with other bytes");
      return;
    }
  }
}

void Exchange(World& world, int count, std::uint32_t num_slots, std::uint64_t slot_bytes) {
  Channel& channel = world.AddChannel(num_slots, slot_bytes);
  world.Start();
  std::thread sender([&] { SendMany(channel.writer, count, slot_bytes); });
  RecvMany(channel.reader, count, slot_bytes);
  sender.join();
  CheckEqual(channel.writer.failure(), "");
  CheckEqual(channel.reader.failure(), "");
  CheckClean(world);
}

// Messages in order, over rings of one and more slots.
void Order(bool use_proxy) {
  for (const std::uint32_t num_slots : {1u, 2u, 3u, 8u}) {
    World world({.seed = num_slots, .use_proxy = use_proxy, .log_num_wqes = 3});
    Exchange(world, use_proxy ? 100 : 400, num_slots, 320);
  }
}

// Past 65536 WQEs, where the index in a WQE and in the doorbell record wraps, and many times around the send queue.
void Wraparound() {
  constexpr int kBatch = 16, kBefore = 65520 / kBatch, kMessages = 100;
  World world({.adversarial = false, .log_num_wqes = 6});
  Channel& channel = world.AddChannel(16, 64);
  world.Start();
  // Most of the way with WRITEs of no consequence, many to a doorbell.
  const Write write = WriteValue(channel.writer.end.peer_region + offsetof(RegionHeader, credit),
                                 channel.writer.end.peer_rkey, 0);
  const std::vector<Write> batch(kBatch, write);
  for (int i = 0; i < kBefore; ++i) {
    Check(Post(world.a.queue, batch.data(), kBatch, cuda::NowNs() + 60'000'000'000) == kOk, "a batch of WRITEs");
  }
  std::thread sender([&] { SendMany(channel.writer, kMessages, 64); });
  RecvMany(channel.reader, kMessages, 64);
  sender.join();
  CheckEqual(channel.writer.failure() + channel.reader.failure(), "");
  const std::uint64_t expected = kBefore * kBatch + 2 * kMessages;
  Check(world.a.nic.writes() == expected && expected > 65536, "all WRITEs are done");
  CheckClean(world);
}

// Several tensors of awkward sizes, one of them at an odd address.
void Sizes() {
  const std::vector<std::uint64_t> sizes = {0, 1, 8, 15, 16, 17, 63, 64, 65, 1000, 4096};
  World world;
  Channel& channel = world.AddChannel(2, 3 * 4096 + 64);
  world.Start();
  int step = 0;
  for (const std::uint64_t bytes : sizes) {
    std::vector<char> first(bytes), second(bytes + 1), third(4096), got_first(bytes), got_second(bytes + 1), got(4096);
    Fill(first.data(), bytes, 1);
    Fill(second.data() + 1, bytes, 2);
    Fill(third.data(), 4096, 3);
    SendOne(channel.writer, {{step, 0, 0}},
            {{first.data(), bytes}, {second.data() + 1, bytes}, {nullptr, 0}, {third.data(), 4096}});
    RecvOne(channel.reader, {{step++, 0, 0}},
            {{got_first.data(), bytes}, {got_second.data() + 1, bytes}, {nullptr, 0}, {got.data(), 4096}});
    Check(first == got_first && second == got_second && third == got, "tensors of " + std::to_string(bytes) + " bytes");
  }
  CheckEqual(channel.writer.failure() + channel.reader.failure(), "");
  CheckClean(world);
}

void TooLarge() {
  World world;
  Channel& channel = world.AddChannel(2, 128);
  world.Start();
  std::vector<char> data(129);
  SendOne(channel.writer, {{3, 2, 0}}, {{data.data(), 129}});
  CheckEqual(channel.writer.failure(),
             "send of 'kv' (step 3, layer 2, batch 0) to the reader failed: the message has 192 bytes, more than a "
             "slot of the ring; make the channel with a larger slot_bytes");
  // The peer learns of it.
  RecvOne(channel.reader, {{3, 2, 0}}, {{data.data(), 129}});
  CheckEqual(channel.reader.failure(),
             "recv of 'kv' (step 3, layer 2, batch 0) from the writer failed: the peer has aborted the channel");
  CheckClean(world);
}

// A ring takes exactly num_slots messages; the reader gives slots back in batches of half the ring.
void Credits() {
  World world({.adversarial = false});
  Channel& channel = world.AddChannel(4, 64);
  world.Start();
  SendMany(channel.writer, 4, 64);
  CheckEqual(channel.writer.failure(), "");
  RecvMany(channel.reader, 3, 64);
  Until([&] { return world.b.nic.writes() >= 1; });
  Check(world.b.nic.writes() == 1, "one credit for three messages");
  Check(HeaderOf(channel.writer.end)->credit == 2, "the credit says 2");
  // Two slots are free, and no third.
  char data[64] = {};
  SendOne(channel.writer, {{4, 0, 0}}, {{data, 64}});
  SendOne(channel.writer, {{5, 0, 0}}, {{data, 64}});
  CheckEqual(channel.writer.failure(), "");
  channel.writer.SetTimeout(kHastyS);
  SendOne(channel.writer, {{6, 5, 0}}, {{data, 64}});
  CheckEqual(channel.writer.failure(),
             "send of 'kv' (step 6, layer 5, batch 0) to the reader failed: no slot of the ring came free in 0.05 s");
  CheckClean(world);
}

void RecvTimeout() {
  World world;
  Channel& channel = world.AddChannel(2, 64);
  world.Start();
  channel.reader.SetTimeout(kHastyS);
  RecvOne(channel.reader, {{7, 3, 0}}, {}, 3);
  const std::string text =
      "recv of tag 3 (step 7, layer 3, batch 0) from the writer failed: no message came in 0.05 s";
  CheckEqual(channel.reader.failure(), text);
  // The first failure stays.
  RecvOne(channel.reader, {{8, 0, 0}}, {}, 3);
  CheckEqual(channel.reader.failure(), text);
  CheckClean(world);
}

void AbortHere() {
  World world;
  Channel& channel = world.AddChannel(2, 64);
  world.Start();
  std::thread waiting([&] { RecvOne(channel.reader, {{1, 0, 0}}, {}); });
  cuda::StoreReleaseSystem(&channel.reader.stop, kStopAborted);
  waiting.join();
  CheckHas(channel.reader.failure(), "this side has aborted the channel");
  // The writer has room, and fails all the same once the news is there.
  Until([&] { return cuda::LoadAcquireSystem(&HeaderOf(channel.writer.end)->peer_stop) != 0; });
  SendMany(channel.writer, 3, 64);
  CheckHas(channel.writer.failure(), "the peer has aborted the channel");
  CheckClean(world);
}

// What was sent before the writer closed still arrives.
void ClosedByWriter() {
  World world;
  Channel& channel = world.AddChannel(4, 64);
  world.Start();
  SendMany(channel.writer, 3, 64);
  TellPeer(channel.writer.end, kStopClosed);
  RecvMany(channel.reader, 3, 64);
  CheckEqual(channel.reader.failure(), "");
  RecvOne(channel.reader, {{3, 0, 0}}, {});
  CheckHas(channel.reader.failure(), "the peer has closed the channel");
  cuda::StoreReleaseSystem(&channel.writer.stop, kStopClosed);
  SendOne(channel.writer, {{4, 0, 0}}, {});
  CheckHas(channel.writer.failure(), "this side has closed the channel");
  CheckClean(world);
}

struct Difference {
  Stamp stamp;
  std::int32_t tag;
  std::vector<std::uint64_t> sizes;
  const char* text;
};

// What is received must be what the receiver describes.
void OtherMessage() {
  const std::vector<Difference> differences = {
      {{{2, 1, 0}}, 1, {64, 64}, "expected step 2, got 1"},
      {{{1, 0, 0}}, 1, {64, 64}, "expected layer 0, got 1"},
      {{{1, 1, 0}}, 2, {64, 64}, "expected tag 2, got 'kv'"},
      {{{1, 1, 0}}, 1, {64}, "expected tensor count 1, got 2"},
      {{{1, 1, 0}}, 1, {64, 128}, "expected payload bytes 192, got 128"},
      {{{1, 1, 0}}, 1, {63, 64}, "its tensors differ in dtype, or in how the bytes are divided among them"},
  };
  for (const Difference& difference : differences) {
    World world;
    Channel& channel = world.AddChannel(2, 256);
    world.Start();
    char sent[128] = {}, got[256] = {};
    SendOne(channel.writer, {{1, 1, 0}}, {{sent, 64}, {sent + 64, 64}});
    Tensors tensors;
    for (const std::uint64_t bytes : difference.sizes) tensors.emplace_back(got, bytes);
    RecvOne(channel.reader, difference.stamp, tensors, difference.tag);
    CheckHas(channel.reader.failure(), difference.text);
    CheckClean(world);
  }
}

// The batch in the stamp chooses the channel.
void Batches() {
  World world;
  Channel& first = world.AddChannel(2, 64);
  Channel& second = world.AddChannel(2, 64);
  world.Start();
  std::int32_t sent = 42, got = 0;
  Stamp stamp{{0, 0, 1}}, out{};
  char* const from = reinterpret_cast<char*>(&sent);
  Send(MakeCall({&first.writer.end, &second.writer.end}, 1, stamp, out, {{from, 4}}), Block{});
  Check(out.words[2] == 1, "the stamp comes out as it went in");
  char* const to = reinterpret_cast<char*>(&got);
  Recv(MakeCall({&first.reader.end, &second.reader.end}, 1, stamp, out, {{to, 4}}), Block{});
  Check(got == 42 && second.reader.end.next == 1 && first.reader.end.next == 0, "it went over the second channel");
  for (const std::int32_t batch : {2, -1}) {
    const Stamp beyond{{0, 0, batch}};
    Half& half = batch == 2 ? first.writer : first.reader;
    Half& other = batch == 2 ? second.writer : second.reader;
    const Call call = MakeCall({&half.end, &other.end}, 1, beyond, out, {});
    batch == 2 ? Send(call, Block{}) : Recv(call, Block{});
    CheckHas(half.failure(), "batch " + std::to_string(batch));
    CheckHas(half.failure(), "the program has 2 channel(s), one per batch from 0");
  }
  CheckClean(world);
}

// Four blocks share each copy; whichever comes last hands over.
void Blocks() {
  constexpr std::uint32_t kBlocks = 4;
  World world;
  Channel& channel = world.AddChannel(2, 4096);
  world.Start();
  for (int step = 0; step < 30; ++step) {
    std::vector<char> sent(4001), got(4001);
    Fill(sent.data(), sent.size(), static_cast<std::uint64_t>(step));
    const Stamp stamp{{step, 0, 0}};
    Stamp out[2];
    const Call send = MakeCall({&channel.writer.end}, 1, stamp, out[0], {{sent.data(), sent.size()}});
    const Call recv = MakeCall({&channel.reader.end}, 1, stamp, out[1], {{got.data(), got.size()}});
    std::vector<std::thread> threads;
    for (std::uint32_t block = 0; block < kBlocks; ++block) {
      threads.emplace_back([&, block] { Recv(recv, Block{block, kBlocks}); });
      threads.emplace_back([&, block] { Send(send, Block{block, kBlocks}); });
    }
    for (std::thread& thread : threads) thread.join();
    Check(sent == got, "step " + std::to_string(step));
  }
  CheckEqual(channel.writer.failure() + channel.reader.failure(), "");
  CheckClean(world);
}

// Channels both ways, each with its own threads, over one send queue of 16 WQEs per side.
void SharedQueue(bool use_proxy) {
  constexpr int kMessages = 300;
  World world({.use_proxy = use_proxy});
  Channel* const channels[] = {&world.AddChannel(3, 200), &world.AddChannel(4, 200), &world.AddChannel(2, 200, false)};
  world.Start();
  std::vector<std::thread> threads;
  std::uint64_t seed = 0;
  for (Channel* channel : channels) {
    seed += 1000;
    threads.emplace_back([=] { SendMany(channel->writer, kMessages, 200, seed); });
    threads.emplace_back([=] { RecvMany(channel->reader, kMessages, 200, seed); });
  }
  for (std::thread& thread : threads) thread.join();
  for (Channel* channel : channels) CheckEqual(channel->writer.failure() + channel->reader.failure(), "");
  CheckClean(world);
}

// A writer that waits for room learns of the NIC's error, not of a timeout.
void LinkDown(bool use_proxy) {
  World world({.use_proxy = use_proxy});
  Channel& channel = world.AddChannel(2, 64);
  world.Start();
  SendMany(channel.writer, 1, 64);
  RecvMany(channel.reader, 1, 64);
  world.a.nic.SetLink(nic_model::Link::kDown);
  char data[64] = {};
  for (int step = 1; step < 5; ++step) SendOne(channel.writer, {{step, 9, 0}}, {{data, 64}});
  CheckHas(channel.writer.failure(), "layer 9, batch 0) to the reader failed: the NIC reports syndrome 0x15");
  CheckHas(channel.writer.failure(), "the peer does not answer");
  CheckClean(world);
}

// After a close the NIC is done with everything, however late it completes; a broken link does not hold it up.
void ClosesOnceDelivered(bool use_proxy) {
  World world({.seed = 5, .use_proxy = use_proxy});
  Channel& channel = world.AddChannel(8, 64);
  world.Start();
  SendMany(channel.writer, 8, 64);
  char data[64] = {};
  const Stamp stamp = {{9, 0, 0}};
  Stamp out{};
  const Call later = MakeCall({&channel.writer.end}, 1, stamp, out, {{data, 64}});
  CloseEnd(channel.writer.end);
  if (use_proxy) Check(world.a.proxy_thread->Settle(cuda::NowNs() + 60'000'000'000), "the proxy has settled");
  Check(world.a.nic.writes() == 17 && world.a.state.completed == 17, "8 messages and the word that says so are there");
  RecvMany(channel.reader, 8, 64);
  CheckEqual(channel.reader.failure(), "");
  RecvOne(channel.reader, {{8, 0, 0}}, {{data, 64}});
  CheckEqual(channel.reader.failure(),
             "recv of 'kv' (step 8, layer 0, batch 0) from the writer failed: the peer has closed the channel");
  // A kernel that starts later finds the end shut, and touches nothing.
  Send(later, Block{});
  Check(world.a.nic.writes() == 17 && channel.writer.record.reason == 0, "a closed end sends nothing");
  world.b.nic.SetLink(nic_model::Link::kDown);
  const std::uint64_t before = cuda::NowNs();
  CloseEnd(channel.reader.end);
  Check(cuda::NowNs() - before < 60'000'000'000, "closing over a broken link ends");
  CheckClean(world);
}

// Who waits learns that the peer is gone, though it has nothing to say to it: a reader that no message reaches, a writer
// that no credit reaches. What they say to find out changes nothing.
void PeerGone(bool use_proxy) {
  World world({.use_proxy = use_proxy});
  Channel& idle = world.AddChannel(2, 64);
  Channel& full = world.AddChannel(2, 64, false);
  world.Start();
  SendMany(full.writer, 2, 64);
  std::thread reader([&] { RecvOne(idle.reader, {{4, 2, 0}}, {}); });
  std::thread writer([&] { SendMany(full.writer, 1, 64); });
  Until([&] { return world.b.nic.writes() >= 4 + 2; });
  world.b.nic.SetLink(nic_model::Link::kDown);
  reader.join();
  writer.join();
  CheckHas(idle.reader.failure(), "recv of 'kv' (step 4, layer 2, batch 0) from the writer failed: the NIC reports "
                                  "syndrome 0x15");
  CheckHas(idle.reader.failure(), "transport retries exceeded: the peer does not answer");
  CheckHas(full.writer.failure(), "send of 'kv' (step 0, layer 1, batch 0) to the reader failed: the NIC reports "
                                  "syndrome 0x15");
  Check(cuda::LoadAcquireSystem(&HeaderOf(idle.writer.end)->credit) == 0, "the reader has given nothing back");
  CheckClean(world);
}

// Many who wait on one queue, some with several blocks; then messages come and all is as ever.
void LongWaits(bool use_proxy) {
  constexpr std::uint32_t kBlocks = 3;
  World world({.use_proxy = use_proxy});
  Channel* const channels[] = {&world.AddChannel(2, 64), &world.AddChannel(4, 64), &world.AddChannel(2, 64, false)};
  world.Start();
  SendMany(channels[2]->writer, 2, 64);
  std::vector<std::thread> threads;
  const Stamp stamp{{0, 1, 0}};
  Stamp out;
  char nothing[1];
  const Call blocks = MakeCall({&channels[1]->reader.end}, 1, stamp, out, {{nothing, 0}});
  for (std::uint32_t block = 0; block < kBlocks; ++block) {
    threads.emplace_back([&, block] { Recv(blocks, Block{block, kBlocks}); });
  }
  threads.emplace_back([&] { RecvMany(channels[0]->reader, 10, 64); });
  threads.emplace_back([&] { SendOne(channels[2]->writer, {{2, 1, 0}}, {}); });
  Until([&] { return world.b.nic.writes() >= 4 + 3; });
  SendMany(channels[1]->writer, 1, 64);
  SendMany(channels[0]->writer, 10, 64);
  std::vector<char> data(64);
  for (int step = 0; step < 2; ++step) RecvOne(channels[2]->reader, {{step, 1, 0}}, {{data.data(), SizeOf(step, 64)}});
  for (std::thread& thread : threads) thread.join();
  RecvOne(channels[2]->reader, {{2, 1, 0}}, {});
  for (Channel* channel : channels) CheckEqual(channel->writer.failure() + channel->reader.failure(), "");
  CheckClean(world);
}

// While a NIC completes nothing, those who wait add one WRITE to what is under way, not one every time.
void OneProbe(bool use_proxy) {
  World world({.use_proxy = use_proxy});
  Channel* const channels[] = {&world.AddChannel(2, 64), &world.AddChannel(2, 64)};
  world.Start();
  world.b.nic.SetLink(nic_model::Link::kStalled);
  std::vector<std::thread> threads;
  for (Channel* channel : channels) {
    channel->reader.SetTimeout(4 * static_cast<double>(cuda::kProbeNs) / 1e9);
    threads.emplace_back([=] { RecvOne(channel->reader, {{0, 0, 0}}, {}); });
  }
  for (std::thread& thread : threads) thread.join();
  Check(world.b.asked() == 3, "one WRITE to find out, and one for each failure");
  for (Channel* channel : channels) CheckHas(channel->reader.failure(), "no message came in");
  CheckClean(world);
}

// What the writer had sent before it was gone is received, though nobody takes the credit any more.
void DeliveredBeforeGone() {
  World world;
  Channel& channel = world.AddChannel(4, 64);
  world.Start();
  SendMany(channel.writer, 4, 64);
  Until([&] { return world.a.nic.writes() == 8; });
  world.b.nic.SetLink(nic_model::Link::kDown);
  RecvMany(channel.reader, 2, 64);
  Until([&] { return QueueErrorOf(channel.reader.end) != kOk; });
  std::vector<char> data(64);
  for (int step = 2; step < 4; ++step) RecvOne(channel.reader, {{step, 1, 0}}, {{data.data(), SizeOf(step, 64)}});
  CheckEqual(channel.reader.failure(), "");
  Check(channel.reader.end.next == 4, "all four are received");
  RecvOne(channel.reader, {{4, 1, 0}}, {});
  CheckHas(channel.reader.failure(), "recv of 'kv' (step 4, layer 1, batch 0) from the writer failed: the NIC reports");
  CheckClean(world);
}

void BadKeys() {
  for (const bool remote : {true, false}) {
    World world;
    Channel& channel = world.AddChannel(1, 64);
    (remote ? channel.writer.end.peer_rkey : channel.writer.end.lkey) ^= 0x100;
    world.Start();
    char data[64] = {};
    for (int step = 0; step < 2; ++step) SendOne(channel.writer, {{step, 0, 0}}, {{data, 64}});
    CheckHas(channel.writer.failure(), remote ? "syndrome 0x13" : "syndrome 0x04");
    CheckClean(world);
  }
}

// The reader's credit can fail too.
void CreditFails() {
  World world;
  Channel& channel = world.AddChannel(1, 64);
  world.Start();
  world.b.nic.SetLink(nic_model::Link::kDown);
  char data[64] = {};
  SendOne(channel.writer, {{0, 0, 0}}, {{data, 64}});
  RecvOne(channel.reader, {{0, 0, 0}}, {{data, 64}});
  RecvOne(channel.reader, {{1, 0, 0}}, {{data, 64}});
  CheckHas(channel.reader.failure(), "recv of 'kv' (step 1, layer 0, batch 0) from the writer failed: the NIC reports");
  CheckClean(world);
}

// A NIC that does nothing ends in a timeout, also where the send queue is full.
void Stalled() {
  World world({.log_num_wqes = 2});
  Channel& channel = world.AddChannel(8, 64);
  world.Start();
  world.a.nic.SetLink(nic_model::Link::kStalled);
  channel.writer.SetTimeout(kHastyS);
  SendMany(channel.writer, 3, 64);
  CheckHas(channel.writer.failure(), "(step 2, layer 1, batch 0) to the reader failed: the send queue is stuck");
  CheckClean(world);
}

}  // namespace
}  // namespace lamina::gda_test

int main(int argc, char** argv) {
  using namespace lamina::gda_test;
  lamina::NameTag(1, "kv");
  return RunCases({{"order", [] { Order(false); }},
                   {"wraparound", Wraparound},
                   {"sizes", Sizes},
                   {"too_large", TooLarge},
                   {"credits", Credits},
                   {"recv_timeout", RecvTimeout},
                   {"abort_here", AbortHere},
                   {"closed_by_writer", ClosedByWriter},
                   {"other_message", OtherMessage},
                   {"batches", Batches},
                   {"blocks", Blocks},
                   {"shared_queue", [] { SharedQueue(false); }},
                   {"link_down", [] { LinkDown(false); }},
                   {"closes_once_delivered", [] { ClosesOnceDelivered(false); }},
                   {"peer_gone", [] { PeerGone(false); }},
                   {"long_waits", [] { LongWaits(false); }},
                   {"one_probe", [] { OneProbe(false); }},
                   {"delivered_before_gone", DeliveredBeforeGone},
                   {"bad_keys", BadKeys},
                   {"credit_fails", CreditFails},
                   {"stalled", Stalled},
                   {"proxy_order", [] { Order(true); }},
                   {"proxy_shared_queue", [] { SharedQueue(true); }},
                   {"proxy_link_down", [] { LinkDown(true); }},
                   {"proxy_closes_once_delivered", [] { ClosesOnceDelivered(true); }},
                   {"proxy_peer_gone", [] { PeerGone(true); }},
                   {"proxy_long_waits", [] { LongWaits(true); }},
                   {"proxy_one_probe", [] { OneProbe(true); }}},
                  argc, argv);
}
